"""How images are computed: rows, precision, products; and what of it cannot work."""

from dataclasses import dataclass

import torch

from models.cpu import split_products
from models.cpu.products import Products
from utils.config import UserError
from utils.precision import check_precision

COMPUTE_BATCH = 8  # rows of a network pass
MATMUL_PRECISIONS = ("highest", "high")  # as torch.set_float32_matmul_precision calls them
MIN_COMPUTE_BATCH = 4  # a guided sample takes up to three, and the decoder takes a quarter


@dataclass
class DrawingSettings:
    """How images are computed. All but lanes and max_samples change their rounding."""

    compute_batch: int = COMPUTE_BATCH  # rows of every network pass; the decoder takes a quarter of it at a time
    lanes: int | None = None  # passes side by side; None: one for each CPU thread, one on a GPU; changes no image
    max_samples: int | None = None  # under way at a time; None: as many as find room
    precision: str = "fp32"  # fp32, bf16, fp16
    compile: bool = False  # the network, with torch.compile: minutes at the start of a long run
    winograd: bool | None = None  # convolutions by tiles, as in models.cpu; None: on a CPU in fp32, highest
    float32_matmul_precision: str = "highest"  # high: fp32 by TF32 on a GPU, by three products of bf16 on a CPU

    def products(self, on_cpu: bool) -> Products | None:
        """What takes the place of the networks' layers; None: nothing."""
        if on_cpu and self.float32_matmul_precision == "high":
            return "split"
        winograd = on_cpu and self.precision == "fp32" if self.winograd is None else self.winograd
        return "winograd" if winograd else "unfolded" if on_cpu else None

    def check(self, device: torch.device) -> None:
        """Raise UserError, naming the key of the section `sampling`, for settings that cannot work on `device`."""
        check_precision(self.precision, "sampling.precision")
        if self.compute_batch < MIN_COMPUTE_BATCH:
            raise UserError(f"sampling.compute_batch: {self.compute_batch}; give at least {MIN_COMPUTE_BATCH}")
        if self.winograd and self.precision != "fp32":
            raise UserError(f"sampling.winograd: true, but sampling.precision is {self.precision}; its sums need fp32")
        key, value = "sampling.float32_matmul_precision", self.float32_matmul_precision
        if value not in MATMUL_PRECISIONS:
            raise UserError(f"{key}: {value!r} is not one of {', '.join(MATMUL_PRECISIONS)}")
        if value == "highest":
            return
        if self.precision != "fp32":
            raise UserError(f"{key}: {value} is for fp32, but sampling.precision is {self.precision}")
        if self.winograd:
            raise UserError(f"{key}: {value}, but sampling.winograd is true; choose one of them")
        if device.type == "cpu":
            if self.compile:
                raise UserError(f"{key}: {value} cannot be compiled on a CPU; give sampling.compile=false, or highest")
            try:
                split_products.library()
            except UserError as error:
                raise UserError(f"{key}: {value}, but {error}; give highest") from error

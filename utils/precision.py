"""fp32, bf16 and fp16 as a setting: weights stay float32, the arithmetic of a block is autocast."""

from collections.abc import Collection

import torch
from torch import nn

from utils.config import UserError
from utils.logging import get_logger

log = get_logger(__name__)

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(name: str, key: str = "precision") -> str:
    """`name` itself; UserError, of the setting `key`, when it is none of fp32, bf16 and fp16."""
    if name not in DTYPES:
        raise UserError(f"{key}: {name!r} is not one of {', '.join(DTYPES)}")
    return name


def warn_of_emulation(name: str, device: torch.device) -> None:
    """Say so where the CPU only emulates precision `name`: that is many times slower than fp32, not faster."""
    capability = torch.backends.cpu.get_cpu_capability()
    if device.type == "cpu" and (name == "fp16" or (name == "bf16" and capability in ("DEFAULT", "AVX2"))):
        log.warning("precision: %s is emulated by this CPU (%s); fp32 is many times faster", name, capability)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which matrix products and convolutions on `device` run in `precision`."""
    dtype = DTYPES[check_precision(precision)]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def cast_products(network: nn.Module, dtype: torch.dtype, keep: Collection[nn.Module] = ()) -> None:
    """Cast the weights of convolutions and linear layers for good; autocast would cast them again at every call.

    Norms keep float32 weights, in which their sums are made; the layers in `keep` stay as they are.
    """
    for module in network.modules():
        if module not in keep and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
            module.to(dtype)

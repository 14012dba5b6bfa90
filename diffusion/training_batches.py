"""The batches of the diffusion loop: latents or images, contexts, and every random number of a step.

Legend: B images of one rank, C channels, H W height and width of what is diffused, D context width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffusion.first_stage import FirstStage
from diffusion.schedule import NoiseSchedule
from diffusion.training_settings import TrainingSettings
from utils import distributed
from utils.data.face_dataset import FaceDataset
from utils.data.step_sampler import StepSampler
from utils.interruption import leave_stopping_to_the_parent
from utils.precision import autocast


@dataclass
class Batch:
    """One rank's part of a step: x_0 (B, C, H, W), contexts (B, D) or None, and its random numbers."""

    x_0: Tensor
    context: Tensor | None
    t: Tensor  # (B,)
    noise: Tensor  # (B, C, H, W)
    empty_mask: Tensor | None  # (B,) bool
    element_mask: Tensor | None  # (B, context channels) bool
    indices: list[int]  # of the images

    def split(self, size: int | None) -> Iterator["Batch"]:
        """The batch in parts of at most `size` images; whole for None."""
        for start in range(0, len(self.x_0), size or len(self.x_0)):
            part = slice(start, start + (size or len(self.x_0)))
            yield Batch(*(None if value is None else value[part] for value in vars(self).values()))


def training_batches(
    unet: nn.Module,
    schedule: NoiseSchedule,
    dataset: FaceDataset,
    first_stage: FirstStage,
    context_scale: float,
    cfg: TrainingSettings,
    first_step: int,
    device: torch.device,
) -> Iterator[Batch]:
    """This rank's batches from `first_step` on, with their random numbers, on `device`.

    Numbers are drawn for the whole global batch from (seed, step), and every rank takes its slice.
    """
    sampler = StepSampler(len(dataset), cfg.batch_size, cfg.seed, cfg.steps, first_step, cfg.horizontal_flip)
    same_identity = dataset.same_identity() if cfg.context_permutation > 0 else None
    conditional = unet.is_context_conditional
    for step, (x_0, indices) in enumerate(_inputs(dataset, first_stage, sampler, cfg, device), start=first_step):
        global_size = cfg.batch_size * distributed.world_size()
        mine = slice(distributed.rank() * cfg.batch_size, (distributed.rank() + 1) * cfg.batch_size)
        generator = torch.Generator().manual_seed(distributed.seed_for(cfg.seed, "step", step))
        t = torch.randint(schedule.num_timesteps, (global_size,), generator=generator)
        noise = torch.randn((global_size, *x_0.shape[1:]), generator=generator)
        empty = torch.rand(global_size, generator=generator) < unet.unconditioned_probability
        kept = torch.rand(global_size, unet.context_channels, generator=generator) >= unet.context_dropout_probability
        context, people = None, indices  # `people`: the images whose embeddings are the contexts
        if conditional:
            if same_identity is not None:
                rng = np.random.default_rng(distributed.seed_for(cfg.seed, "permutation", step))
                swap = rng.random(global_size)[mine] < cfg.context_permutation
                which = rng.random(global_size)[mine]
                others = [
                    int(same_identity[i][int(w * len(same_identity[i]))]) for i, w in zip(indices, which, strict=True)
                ]
                people = np.where(swap, others, indices).tolist()
            context = (dataset.embeddings[people] * context_scale).to(device, non_blocking=True)
        yield Batch(
            x_0=x_0,
            context=context,
            t=t[mine].to(device, non_blocking=True),
            noise=noise[mine].to(device, non_blocking=True),
            empty_mask=empty[mine].to(device, non_blocking=True) if conditional else None,
            element_mask=kept[mine].to(device, non_blocking=True)
            if conditional and unet.context_dropout_probability > 0
            else None,
            indices=list(indices),
        )


def _inputs(
    dataset: FaceDataset, first_stage: FirstStage, sampler: StepSampler, cfg: TrainingSettings, device: torch.device
) -> Iterator[tuple[Tensor, list[int]]]:
    """x_0 (B, C, h, w) of each step and the indices of its images: out of the cache, or images through the encoder."""
    if first_stage.latents is not None:
        for items in sampler:
            rows, flips = zip(*items, strict=True)
            yield first_stage.cached(list(rows), list(flips)).to(device), list(rows)
        return
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=cfg.num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=cfg.num_workers > 0,
        worker_init_fn=leave_stopping_to_the_parent,
    )
    for images, indices in loader:
        with torch.no_grad(), autocast(device, cfg.precision):
            x_0 = first_stage.encode(images.to(device, non_blocking=True))  # images => latents
        yield x_0.float(), indices.tolist()

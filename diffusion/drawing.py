"""Faces from jobs: noise from each job's seed, the sampling engine, the decoder.

An image is a function of its job and the settings alone. Network and decoder are always called with one fixed number of
rows, on a CPU each call on one thread, so that in float32 it is the same to the last bit whatever else is drawn, in
whatever order, on however many cores.

Legend: C channels, h w height and width of what is diffused, H W of the image, D context width.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.drawing_settings import DrawingSettings
from diffusion.engine import Engine, Observer, Start, Trajectory
from diffusion.generator import FaceGenerator
from diffusion.samplers import Sampler, TwoStage
from models.cpu.products import use_products
from utils.config import UserError
from utils.images import resize, to_uint8
from utils.precision import DTYPES, autocast, cast_products


@dataclass
class Job:
    """One image to draw."""

    key: Hashable  # comes back with the image
    seed: int  # of all its noise
    context: Tensor | None = None  # unit (D,), () class number, or None for the empty context
    negative: Tensor | None = None  # unit (D,): whom guidance leads away from; None: the empty context


@dataclass
class Drawn:
    """One image and what is known of it."""

    key: Hashable
    image: np.ndarray  # uint8 (H, W, 3)
    switch_t: int | None = None  # timestep whose d fell under the threshold, -1: none did; None: no stages
    d: list[float] | None = None  # (S - 1,) change of the attention map in the S steps of stage 1; None: no stages


class FaceDrawer:
    """Draws images with one generator and one sampler."""

    def __init__(
        self,
        generator: FaceGenerator,
        sampler: Sampler,
        settings: DrawingSettings,
        *,
        image_size: int | None = None,
        observer: Observer | None = None,
    ) -> None:
        """The generator stays on its device; half precisions and a CPU's convolutions change its networks for good.
        image_size: side of the images in pixels; None: as decoded. observer: see `Engine`."""
        rule, solver = sampler.parts(generator.schedule)
        self.generator, self.settings, self.image_size = generator, settings, image_size
        self.has_stages = isinstance(sampler, TwoStage)
        self.device = next(generator.unet.parameters()).device
        decoder = generator.first_stage.decoder
        on_cpu = self.device.type == "cpu"
        products = settings.products(on_cpu)
        if products is not None:
            for network in (generator.unet, *([] if decoder is None else [decoder])):
                use_products(network, products, keep=generator.unet.time_layers())
        if not on_cpu:
            torch.set_float32_matmul_precision(settings.float32_matmul_precision)
        self.decoder_batch = max(1, settings.compute_batch // 4)  # images take more memory than latents
        self.engine = Engine(
            generator.unet,
            rule,
            solver,
            compute_batch=settings.compute_batch,
            lanes=settings.lanes,
            max_samples=settings.max_samples,
            precision=settings.precision,
            compile=settings.compile,
            observer=observer,
        )
        dtype = DTYPES[settings.precision]
        if dtype is not None and decoder is not None:
            cast_products(decoder, dtype)

    def draw(self, jobs: Iterable[Job]) -> Iterator[Drawn]:
        """Draw the images of all jobs, which are pulled when there is room for one; yields them as they end.

        Raises UserError when the model's output is not finite.
        """
        ended: list[Trajectory] = []
        decoding: deque[Future[list[Drawn]]] = deque()
        for trajectory in self.trajectories(jobs):
            ended.append(trajectory)
            if len(ended) == self.decoder_batch:
                decoding.append(self.engine.lanes.submit(self._decode, ended))
                ended = []
            while decoding and decoding[0].done():
                yield from decoding.popleft().result()
        if ended:
            decoding.append(self.engine.lanes.submit(self._decode, ended))
        for decoded in decoding:
            yield from decoded.result()

    def trajectories(self, jobs: Iterable[Job]) -> Iterator[Trajectory]:
        """The same without the decoder: x_t of each is its x_0 (C, h, w)."""
        return self.engine.run(self._start(job) for job in jobs)

    def decode(self, x_0: Tensor) -> np.ndarray:
        """Images of x_0 (n, C, h, w), n >= 1, wherever on its way it was predicted: uint8 (n, H, W, 3), decoded as
        those of `draw` are, to the last bit.

        Raises UserError for values that are not finite.
        """
        chunks = [self.engine.lanes.submit(self._images, chunk) for chunk in x_0.split(self.decoder_batch)]
        return np.concatenate([chunk.result() for chunk in chunks])

    def _start(self, job: Job) -> Start:
        """Noise is drawn on the CPU, so that all devices start from the same."""
        noise = torch.Generator().manual_seed(job.seed)
        x_T = torch.randn(self.generator.latent_shape, generator=noise).to(self.device)  # (C, h, w)
        return Start(job.key, x_T, self._scaled(job.context), self._scaled(job.negative), noise)

    def _scaled(self, context: Tensor | None) -> Tensor | None:
        if context is None:
            return None
        context = context.to(self.device)
        return context * self.generator.context_scale if context.is_floating_point() else context

    def _decode(self, ended: list[Trajectory]) -> list[Drawn]:
        images = self._images(torch.stack([trajectory.x_t for trajectory in ended]))
        return [self._drawn(trajectory, image) for trajectory, image in zip(ended, images, strict=True)]

    @torch.no_grad()
    def _images(self, x_0: Tensor) -> np.ndarray:
        """At most `decoder_batch` x_0 (n, C, h, w), filled up to so many => uint8 (n, H, W, 3)."""
        if not torch.isfinite(x_0).all():
            precision = self.settings.precision
            advice = "try another checkpoint or less guidance" if precision == "fp32" else "try bf16 or fp32"
            raise UserError(f"precision: the model draws values that are not finite in {precision}; {advice}")
        padding = x_0[:1].expand(self.decoder_batch - len(x_0), *x_0.shape[1:])
        with autocast(self.device, self.settings.precision):
            decoded = self.generator.first_stage.decode(torch.cat([x_0, padding]))
        images = to_uint8(decoded.float())[: len(x_0)]
        if self.image_size is not None:
            images = resize(images, self.image_size, antialias=False)  # as the published presets go from 128 to 112
        return images

    def _drawn(self, trajectory: Trajectory, image: np.ndarray) -> Drawn:
        told: dict[str, Any] = {}
        if self.has_stages:
            told = {"switch_t": trajectory.progress.switch_t, "d": trajectory.progress.d}
        return Drawn(trajectory.start.key, image, **told)

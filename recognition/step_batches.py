"""Which images a step sees: a function of (seed, step) alone, whatever the number of processes or restarts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from recognition.training_sets import SetPart
from utils.config import UserError
from utils.distributed import seed_for


class StepBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (pass, index) for the steps first_step .. last_step - 1 of one process.

    Every pass over the images is a permutation drawn from (seed, pass), cut into global batches; a process takes its
    consecutive part of each. The images past the last whole batch wait for another pass.

    Where `parts` have weights, each has passes of its own, and gives every global batch the same number of images; the
    batch is then shuffled, so that every process gets some of each set.
    """

    def __init__(
        self,
        num_images: int,
        *,
        batch_size: int,
        first_step: int,
        last_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        parts: Sequence[SetPart] = (),
    ) -> None:
        """`batch_size` images a process; UserError where all processes together want more images than there are, or a
        weight is too small for a single image a step."""
        if batch_size < 2:
            raise UserError(f"training.batch_size: {batch_size}; batch norm needs two images or more")
        self.global_batch = batch_size * world_size
        if self.global_batch > num_images:
            raise UserError(
                f"training.batch_size: {batch_size} on each of {world_size} processes; the training set holds only "
                f"{num_images} images"
            )
        self.seed, self.first_step, self.last_step = seed, first_step, last_step
        self.mine = slice(rank * batch_size, (rank + 1) * batch_size)
        self.shares: dict[str, int] = {}  # images of a global batch by set, where sets have weights
        if parts and parts[0].weight is not None:
            counts = batch_shares(parts, self.global_batch)
            self.shares = {part.name: count for part, count in zip(parts, counts, strict=True)}
            self.streams = [
                _Stream(part.start, part.stop, count, (seed, "order", k))
                for k, (part, count) in enumerate(zip(parts, counts, strict=True))
            ]
        else:
            self.streams = [_Stream(0, num_images, self.global_batch, (seed, "order"))]

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.batch, range(self.first_step, self.last_step))

    def batch(self, step: int) -> list[tuple[int, int]]:
        """This process's (pass, index) at `step`."""
        items = [item for stream in self.streams for item in stream.draw(step)]
        if len(self.streams) > 1:
            order = np.random.default_rng(seed_for(self.seed, "batch", step)).permutation(len(items))
            items = [items[k] for k in order]
        return items[self.mine]


class _Stream:
    """`count` images a step out of start .. stop - 1, in passes."""

    def __init__(self, start: int, stop: int, count: int, key: tuple[int | str, ...]) -> None:
        self.start, self.length, self.count, self.key = start, stop - start, count, key
        self.drawn, self.order = -1, np.empty(0, np.int64)  # the permutation of the pass at hand

    def draw(self, step: int) -> list[tuple[int, int]]:
        number, position = divmod(step, self.length // self.count)
        if number != self.drawn:
            generator = np.random.Generator(np.random.PCG64(seed_for(*self.key, number)))
            self.drawn, self.order = number, generator.permutation(self.length)
        chosen = self.order[position * self.count : (position + 1) * self.count] + self.start
        return [(number, int(index)) for index in chosen]


def batch_shares(parts: Sequence[SetPart], global_batch: int) -> list[int]:
    """How many images of each set a global batch holds: the weights' shares, rounded by the largest remainder.

    Raises UserError where a set would give none, or holds fewer than that.
    """
    weights = np.array([part.weight for part in parts], np.float64)
    exact = global_batch * weights / weights.sum()
    counts = np.floor(exact).astype(int)
    for k in np.argsort(counts - exact, kind="stable")[: global_batch - counts.sum()]:
        counts[k] += 1
    for k, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if count < 1:
            raise UserError(
                f"dataset.sets[{k}].weight: {part.weight:g} is {exact[k]:.2g} of the {global_batch} images of a step; "
                "give it more, or take a larger training.batch_size"
            )
        if count > part.stop - part.start:
            raise UserError(
                f"dataset.sets[{k}].weight: {part.weight:g} is {count} of the {global_batch} images of a step, but "
                f"{part.name} holds only {part.stop - part.start}"
            )
    return counts.tolist()

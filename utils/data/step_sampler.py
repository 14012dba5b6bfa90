"""Which images a training step sees: a pure function of (seed, step), whatever the number of processes or restarts."""

from collections.abc import Iterator

import numpy as np

from utils import distributed


class StepSampler:
    """Batches of `(index, flip)` for this rank, one a step, from `first_step` up to `steps`.

    The data set is passed over in a new random order each epoch; a batch may reach over the end of an epoch. The global
    batch of a step is cut into `world_size` runs of `batch_size`, so that 2 processes x 32 see what 1 x 64 sees.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int, steps: int, first_step: int = 0, horizontal_flip: bool = True
    ) -> None:
        """`n` items; `batch_size` a process; steps are counted from 0."""
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.steps, self.first_step, self.horizontal_flip = steps, first_step, horizontal_flip
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return max(0, self.steps - self.first_step)

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        for step in range(self.first_step, self.steps):
            yield self.local_batch(step)

    def local_batch(self, step: int) -> list[tuple[int, bool]]:
        """This rank's items at `step`."""
        global_size = self.batch_size * distributed.world_size()
        first = step * global_size + distributed.rank() * self.batch_size
        return [self._item(position) for position in range(first, first + self.batch_size)]

    def _item(self, position: int) -> tuple[int, bool]:
        epoch, offset = divmod(position, self.n)
        if epoch != self._epoch:
            rng = np.random.default_rng(distributed.seed_for(self.seed, "order", epoch))
            self._epoch, self._order = epoch, rng.permutation(self.n)
            self._flips = rng.random(self.n) < 0.5
        return int(self._order[offset]), bool(self.horizontal_flip and self._flips[offset])

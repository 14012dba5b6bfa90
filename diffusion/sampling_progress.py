"""How drawing goes, over all processes, shown by the first one.

Legend: S steps of stage 1.
"""

from collections.abc import Sequence

from tqdm import tqdm

from diffusion.drawing import Drawn
from utils import distributed
from utils.distributed import SharedCounter


class SamplingProgress:
    """A bar of images, images a second, time left and the mean step at which samples switched."""

    def __init__(self, run: str, total: int, timesteps: Sequence[int]) -> None:
        """run: name of the run; total: images that all processes are to draw; timesteps: of the sampler, descending."""
        self._step = {t: number for number, t in enumerate(timesteps, start=1)}
        self._images, self._switched, self._steps = (
            SharedCounter(f"{run}/{name}") for name in ("images", "switched", "switch_steps")
        )
        world = distributed.world_size()
        self._bar = tqdm(
            total=total,
            unit="image",
            desc="drawing" if world == 1 else f"drawing ({world} processes)",
            smoothing=0.1,  # images come in batches
            disable=not distributed.is_main() or not total,
        )

    def __enter__(self) -> "SamplingProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.refresh()
        self._bar.close()

    def add(self, drawn: Drawn) -> None:
        """Count an image of this process."""
        self._images.add(1)
        if drawn.switch_t in self._step:
            self._switched.add(1)
            self._steps.add(self._step[drawn.switch_t])
        self.refresh()

    def refresh(self) -> None:
        """Show what all processes have done; only the first does."""
        if self._bar.disable:
            return
        mean = self.mean_switch_step()
        if mean is not None:
            self._bar.set_postfix_str(f"mean switch step {mean:.1f} of {len(self._step)}", refresh=False)
        self._bar.update(self._images.add() - self._bar.n)

    def mean_switch_step(self) -> float | None:
        """Number, from 1 on, of the step whose d fell under the threshold, over those that switched; None: none did."""
        switched = self._switched.add()
        return self._steps.add() / switched if switched else None

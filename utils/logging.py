"""What a run tells: a logger that lives with tqdm, a log file, TensorBoard scalars. Rank 0 speaks, others warn."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import distributed

FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


class _TqdmHandler(logging.Handler):
    """Writes log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; call it with `__name__`."""
    return logging.getLogger(name)


def setup_logging(output_dir: str | Path | None = None) -> None:
    """Send INFO and above to standard error and, with `output_dir`, to `<output_dir>/log.txt`, on rank 0.

    Other ranks report warnings only, with their number. Calling it again replaces the handlers.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_TqdmHandler()]
    prefix = "" if distributed.is_main() else f"[rank {distributed.rank()}] "
    if distributed.is_main() and output_dir is not None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(Path(output_dir) / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(prefix + FORMAT, datefmt="%H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(logging.INFO if distributed.is_main() else logging.WARNING)


class ScalarLogger:
    """TensorBoard scalars and images under `<output_dir>/tensorboard`; does nothing on other ranks than 0."""

    def __init__(self, output_dir: str | Path) -> None:
        self._writer = None
        if distributed.is_main():
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

            self._writer = SummaryWriter(str(Path(output_dir) / "tensorboard"))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log each named value at `step`."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Log `image`, uint8 (H, W, 3) RGB, at `step`."""
        if self._writer is not None:
            self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()

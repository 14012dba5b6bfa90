"""What a run tells: a logger that lives with tqdm, a log file, TensorBoard scalars. Rank 0 speaks, others warn."""

import hashlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils import distributed
from utils.errors import UserError

FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


class _TqdmHandler(logging.Handler):
    """Writes log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _LogFile(logging.FileHandler):
    """A file of log lines. A disk that does not take them costs these lines alone, and says so nowhere: what the run
    itself has to write will tell."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


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
        handlers.append(_LogFile(Path(output_dir) / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(prefix + FORMAT, datefmt="%H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(logging.INFO if distributed.is_main() else logging.WARNING)


def check_wandb(project: str | None) -> None:
    """Raise UserError where a project of Weights & Biases is named and the package is not installed."""
    if project is None:
        return
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        message = f"training.wandb_project: {project}, but the package wandb is not installed; pip install wandb"
        raise UserError(message) from error


class ScalarLogger:
    """Scalars and images to TensorBoard (`<output_dir>/tensorboard`) and, if asked, to Weights & Biases.

    Does nothing on other ranks than 0.
    """

    def __init__(
        self, output_dir: str | Path, wandb_project: str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        """A run that is resumed in the same folder goes on as the same run of `wandb_project`.

        `check_wandb` says whether the package is there.
        """
        self._writer, self._wandb = None, None
        if not distributed.is_main():
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self._writer = SummaryWriter(str(Path(output_dir) / "tensorboard"))
        if wandb_project is not None:
            import wandb

            folder = Path(output_dir).resolve()
            identity = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
            self._image = wandb.Image
            self._wandb = wandb.init(
                project=wandb_project,
                name=folder.name,
                id=identity,
                resume="allow",
                dir=str(folder),
                config=dict(config or {}),
            )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log each named value at `step`."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Log `image`, uint8 (H, W, 3) RGB, at `step`."""
        if self._writer is not None:
            self._writer.add_image(name, image, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({name: self._image(image)}, step=step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()

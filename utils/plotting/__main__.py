"""Draw the paper's figures: python -m utils.plotting checkpoint.path=... (settings: configs/plotting_config.yaml).

The figures of the method need a checkpoint, those of a data set what evaluate.py found of it (evaluation.dir). Each is
<output_dir>/<name>.png, written whole or not at all. The images are those that sample.py draws with the same settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from zipfile import BadZipFile

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from evaluation.results import FACTS, TABLES, SetResult
from utils import distributed
from utils.config import UserError, entry_point, existing_file, existing_folder
from utils.images import write_encoded
from utils.logging import get_logger
from utils.plotting.catalogue import METHOD_FIGURES, NAMES, SET_FIGURES, draw_method, draw_sets, method_names, set_work
from utils.plotting.settings import load_method, read_evaluation_settings

log = get_logger(__name__)

ALL = "all"


@entry_point("plotting_config")
def main(cfg: DictConfig) -> list[Path]:
    """Draw what is asked for; returns the files. With several processes the first draws."""
    return distributed.on_main(lambda: draw(cfg))


def draw(cfg: DictConfig) -> list[Path]:
    """Check everything, then draw one figure after the other."""
    names = chosen(cfg.figure)
    of_method = [name for name in METHOD_FIGURES if names is None or name in names]
    of_sets = [name for name in SET_FIGURES if names is None or name in names]
    evaluation = read_evaluation_settings(cfg)
    if names is None and cfg.checkpoint.path is None and evaluation.dir is None:
        raise UserError(
            "checkpoint.path: not set, nor is evaluation.dir; the figures of the method need the one, those of a data "
            "set the other"
        )
    parts, total = [], 0
    if of_sets and (names is not None or evaluation.dir is not None):
        work = set_work(read_results(evaluation.dir), None if names is None else of_sets)
        parts, total = [draw_sets(work, evaluation)], len(work)
    if of_method and (names is not None or cfg.checkpoint.path is not None):
        if cfg.checkpoint.path is None:
            raise UserError(f"checkpoint.path: not set; the figure {of_method[0]} needs it")
        method = load_method(cfg)
        of_method = method_names(method, None if names is None else of_method)
        parts, total = [*parts, draw_method(method, of_method)], total + len(of_method)
    files = []
    for name, (_, _, data) in tqdm(chain(*parts), desc="figures", total=total, unit="figure"):
        file = Path(cfg.output_dir) / f"{name}.png"
        write_encoded(file, data)
        files.append(file)
    log.info("%d figures in %s", len(files), cfg.output_dir)
    return files


def chosen(figure: object) -> list[str] | None:
    """The names in the key `figure`, a name or a list of them; None: all. Raises UserError for others."""
    names = OmegaConf.to_container(figure) if OmegaConf.is_config(figure) else [figure]
    if names == [ALL]:
        return None
    for name in names:
        if name not in NAMES:
            raise UserError(f"figure: {name!r} is no figure; there are {', '.join(NAMES)}, and {ALL}")
    if not names:
        raise UserError(f"figure: an empty list; give some of {', '.join(NAMES)}, or {ALL}")
    return names


def read_results(folder: str | None) -> Sequence[SetResult]:
    """What evaluate.py found, of the set in `folder` or of all sets below it. Raises UserError where nothing is."""
    path = existing_folder(folder, "evaluation.dir", "the output_dir of evaluate.py, or one set's folder in it")
    folders = [path] if (path / FACTS).is_file() else sorted(file.parent for file in path.glob(f"*/{FACTS}"))
    if not folders:
        raise UserError(f"evaluation.dir: no {FACTS} in {path}; give the output_dir of evaluate.py")
    for one in folders:
        existing_file(one / TABLES, "evaluation.dir", "evaluate the set again")
    return [_read_result(one) for one in folders]


def _read_result(folder: Path) -> SetResult:
    try:
        return SetResult.load(folder)
    except (ValueError, KeyError, TypeError, BadZipFile) as error:
        raise UserError(
            f"evaluation.dir: {folder} holds no result that this version reads ({type(error).__name__}); evaluate the "
            "set again"
        ) from error


if __name__ == "__main__":
    main()

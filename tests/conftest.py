"""What several test files share: composed configurations, a tiny data set, and launching the project's scripts."""

import subprocess
from collections import Counter
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from utils import curves
from utils.config import CONFIG_DIR
from utils.images import write_image

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # the networks here are tiny: a second thread costs more than it brings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests first, so that no process is left alone with them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch) -> None:
    """Drawing them takes longer than the runs here; tests marked `curves` have theirs, and so have fixtures that run
    once for a file."""
    if request.node.get_closest_marker("curves") is None:
        monkeypatch.setattr(curves, "plot_metrics", lambda *args: None)


@pytest.fixture
def compose():
    """compose(config_name, *overrides) -> DictConfig, as the command line would give it."""

    def _compose(config_name: str, *overrides: str) -> DictConfig:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return hydra.compose(config_name, list(overrides))

    return _compose


@pytest.fixture
def face_folder(tmp_path):
    """A folder of 6 identities x 3 images of 32 x 32 pixels, smooth and different, with embeddings of width 16."""
    rng = np.random.default_rng(0)
    names, embeddings = [], []
    yy, xx = np.mgrid[0:32, 0:32] / 31.0
    for identity in range(6):
        direction = rng.standard_normal(16)
        colour = rng.uniform(60, 200, 3)
        for k in range(3):
            wave = np.sin(6.28 * (xx * (1 + identity % 3) + yy * (1 + identity // 3)) + k)[..., None]
            image = np.clip(colour + 50 * wave, 0, 255).astype(np.uint8)
            name = f"id{identity}/{k}.png"
            (tmp_path / "faces" / f"id{identity}").mkdir(parents=True, exist_ok=True)
            write_image(tmp_path / "faces" / name, image)
            names.append(name)
            embeddings.append(direction + 0.1 * rng.standard_normal(16))
    np.savez(tmp_path / "embeddings.npz", names=np.asarray(names), embeddings=np.asarray(embeddings, np.float32))
    return tmp_path


@pytest.fixture
def run_script(tmp_path_factory):
    """run_script("main.py", *arguments, processes=1, check=True) -> CompletedProcess with text output.

    As a shell or torchrun starts it, but forked from a server that has torch: half the time of a short run.
    """

    def _run(script: str, *arguments: str, processes: int = 1, check: bool = True, timeout: float = 240):
        from tests.processes import start_script

        folder = tmp_path_factory.mktemp("said")
        output, errors = folder / "output.txt", folder / "errors.txt"
        ranks = start_script(script, arguments, processes, output, errors)
        for rank in ranks:
            rank.join(timeout)
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
        code = next((code for code in codes if code != 0), 0)
        done = subprocess.CompletedProcess([script, *arguments], code, output.read_text(), errors.read_text())
        if check and code != 0:
            raise AssertionError(f"{script} exited {code}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return done

    return _run

"""Draw a data set: `python sample.py ...` or `torchrun --nproc_per_node 8 sample.py ...`.

Settings: configs/sample_ddim_config.yaml. The same command goes on where a stopped run ended.
"""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from diffusion.generator import CheckpointChoice
from diffusion.sampling_run import draw_data_set
from diffusion.sampling_settings import SamplingSettings
from diffusion.sampling_setup import set_up
from utils.config import entry_point, existing_file, settings
from utils.logging import get_logger

log = get_logger(__name__)


@entry_point("sample_ddim_config")
def main(cfg: DictConfig) -> dict[str, Any]:
    """Rebuild the generator, read the contexts, draw; return counts and times."""
    sampling = settings(cfg.sampling, SamplingSettings, "sampling")
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        sampling.save_dir = cfg.output_dir  # each job of a sweep has its own
    choice = settings(cfg.checkpoint, CheckpointChoice, "checkpoint")
    if cfg.VQEncoder_path is not None:
        existing_file(cfg.VQEncoder_path, "VQEncoder_path")
        log.info("VQEncoder_path: not needed for drawing")
    generator, identities, sampler = set_up(cfg, sampling)
    source = {
        "checkpoint.path": _name(choice.path),  # names alone: the data set may be published
        "step": generator.step,
        "weights": "published" if generator.is_published else "live" if choice.use_non_ema else "ema",
        "VQDecoder_path": _name(cfg.VQDecoder_path),
        "sampling.contexts_file": _name(sampling.contexts_file),
    }
    return draw_data_set(generator, sampler, identities, sampling, source)


def _name(path: str | None) -> str | None:
    return None if path is None else Path(path).name


if __name__ == "__main__":
    main()

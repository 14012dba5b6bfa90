"""A folder of rendered people: python -m utils.data.rendered output_dir=... (settings: configs/render_config.yaml)."""

from dataclasses import dataclass

from omegaconf import DictConfig

from utils.config import entry_point, settings
from utils.data.rendered.dataset import render_dataset
from utils.logging import get_logger

logger = get_logger("render")


@dataclass
class RenderSettings:
    output_dir: str
    n_identities: int
    images_per_identity: int
    image_size: int
    seed: int
    first_identity: int
    nuisance_strength: float
    image_format: str
    processes: int | None


@entry_point("render_config")
def main(cfg: DictConfig) -> None:
    s = settings(cfg, RenderSettings, "")
    count = render_dataset(
        s.output_dir,
        s.n_identities,
        s.images_per_identity,
        size=s.image_size,
        seed=s.seed,
        first_identity=s.first_identity,
        processes=s.processes,
        strength=s.nuisance_strength,
        suffix=s.image_format,
    )
    logger.info("%d images rendered, %d in %s", count, s.n_identities * s.images_per_identity, s.output_dir)


if __name__ == "__main__":
    main()

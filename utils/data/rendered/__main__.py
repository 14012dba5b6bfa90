"""`python -m utils.data.rendered output_dir=data/rendered n_identities=500`: a folder of rendered people."""

from omegaconf import DictConfig

from utils.config import entry_point
from utils.data.rendered.dataset import render_dataset


@entry_point("render_config")
def main(cfg: DictConfig) -> None:
    render_dataset(
        cfg.output_dir,
        cfg.n_identities,
        cfg.images_per_identity,
        size=cfg.image_size,
        seed=cfg.seed,
        first_identity=cfg.first_identity,
        processes=cfg.processes,
        strength=cfg.nuisance_strength,
        suffix=cfg.image_format,
    )


if __name__ == "__main__":
    main()

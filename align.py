"""Align faces to 112 x 112: python align.py input_dir=... output_dir=... (settings: configs/align_config.yaml)."""

from omegaconf import DictConfig

from utils.alignment_job import SUMMARY, AlignSettings, run_alignment
from utils.config import entry_point, settings
from utils.logging import get_logger

logger = get_logger("align")


@entry_point("align_config")
def main(cfg: DictConfig) -> None:
    summary = run_alignment(settings(cfg, AlignSettings, ""))
    logger.info(
        "%d images of %d identities: %d aligned (%.2f %%), %d resized, %d failed (%d of them unreadable), "
        "%d discarded; %.0f s, %.1f/s; %s/%s",
        *(summary["images"], summary["identities"], summary["aligned"], 100 * summary["rate"], summary["resized"]),
        *(
            summary["failed"],
            summary["unreadable"],
            summary["discarded"],
            summary["seconds"],
            summary["images_per_second"],
        ),
        *(cfg.output_dir, SUMMARY),
    )


if __name__ == "__main__":
    main()

"""Embed a folder of faces: python encode.py checkpoint=... input_dir=... output_dir=... (configs/encode_config.yaml).

Legend: n images, D width. The images are embedded in parts of 256, each kept in `<output_dir>/.parts` until all are
done: a killed run goes on with the part it was at, with any number of ranks.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from tqdm import tqdm

from recognition.backbones import load_backbone, load_published_backbone
from recognition.embedding import embed_images
from utils import distributed
from utils.checkpoint import write_json
from utils.config import UserError, entry_point, existing_file, existing_folder, settings
from utils.contexts import save_rows, write_embeddings
from utils.images import image_size, list_images
from utils.logging import get_logger

PART_SIZE = 256
logger = get_logger("encode")


@dataclass
class EncodeSettings:
    """The keys of configs/encode_config.yaml."""

    checkpoint: str
    input_dir: str
    output_dir: str
    backbone: str | None  # name of a published file's network, with its input size below
    input_size: int
    flip: bool
    batch_size: int
    device: str


def describe(options: EncodeSettings, names: list[str]) -> dict[str, Any]:
    """What the embeddings depend on; a finished or begun output folder of another description is not reused."""
    images = hashlib.sha256()
    for name in names:
        images.update(f"{name}\0{(Path(options.input_dir) / name).stat().st_size}\n".encode())
    weights = hashlib.sha256(Path(options.checkpoint).read_bytes()).hexdigest()
    kept = {key: value for key, value in asdict(options).items() if key not in ("output_dir", "batch_size", "device")}
    return {**kept, "images": len(names), "images_sha256": images.hexdigest(), "checkpoint_sha256": weights}


def encode(options: EncodeSettings) -> None:
    """Embed every image below options.input_dir and write the four files (see utils.contexts.write_embeddings)."""
    checkpoint = existing_file(options.checkpoint, "checkpoint", "recognition.train writes backbone.safetensors")
    root = existing_folder(options.input_dir, "input_dir", "the folder of aligned faces")
    if options.batch_size < 1:
        raise UserError(f"batch_size: {options.batch_size}; it is at least 1")
    names = list_images(root)
    if not names:
        raise UserError(f"input_dir: no images in {root}; it holds one folder of images an identity")
    if options.backbone is None:
        backbone = load_backbone(checkpoint)
    else:
        backbone = load_published_backbone(checkpoint, options.backbone, input_size=options.input_size)
    height, width = image_size(root / names[0])
    if height != width:
        logger.warning(
            "input_dir: %s is %d x %d pixels, not a square crop; recognisers take faces as align.py makes them",
            *(names[0], width, height),
        )
    output_dir = Path(options.output_dir)
    description_file, parts = output_dir / "encoder.json", output_dir / ".parts"
    description = describe(options, names)
    if description_file.exists():
        found = json.loads(description_file.read_text(encoding="utf-8"))
        if found == description:
            logger.info("%s: embedded before", output_dir)
            return
        _check_same_settings(found, description, output_dir)
    files = [(start, parts / f"{start:08d}.npy") for start in range(0, len(names), PART_SIZE)]
    if distributed.is_main():
        _claim(parts, description)
    distributed.barrier()
    todo = [item for item in files if not item[1].exists()]
    distributed.barrier()  # all ranks have looked before one writes: they must share out the same list
    device = distributed.device(options.device)
    mine = distributed.share(todo)
    total = sum(len(names[start : start + PART_SIZE]) for start, _ in mine)
    with tqdm(total=total, desc="embed", unit="image", disable=not distributed.is_main()) as bar:
        for start, file in mine:
            part = names[start : start + PART_SIZE]
            rows = embed_images(
                backbone, part, root=root, batch_size=options.batch_size, flip=options.flip, device=device
            )  # (part, D)
            save_rows(file, rows)
            bar.update(len(part))
    distributed.barrier()
    if distributed.is_main():
        write_embeddings(output_dir, names, np.concatenate([np.load(file, allow_pickle=False) for _, file in files]))
        write_json(description_file, description)
        shutil.rmtree(parts)
        logger.info(
            "%d embeddings, %d wide, in %s: embeddings.npy for main.py (model.context_input_channels=%d), contexts.npy "
            "for sample.py",
            *(len(names), backbone.num_features, output_dir, backbone.num_features),
        )
    distributed.barrier()


def _check_same_settings(found: dict[str, Any], description: dict[str, Any], output_dir: Path) -> None:
    """More images are embedded anew; with another network or folder, what is there may still be needed."""
    for key in ("checkpoint_sha256", "input_dir", "backbone", "input_size", "flip"):
        if found.get(key) != description[key]:
            shown = "checkpoint" if key == "checkpoint_sha256" else key
            raise UserError(
                f"{shown}: {description[shown]}, but the embeddings in {output_dir} were made with {found.get(shown)}"
                f"{' of other content' if found.get(shown) == description[shown] else ''}; give another output_dir"
            )


def _claim(parts: Path, description: dict[str, Any]) -> None:
    """Keep the parts of a killed run with the same description; throw others away."""
    claim = parts / "encoder.json"
    if not (claim.exists() and json.loads(claim.read_text(encoding="utf-8")) == description):
        shutil.rmtree(parts, ignore_errors=True)
        write_json(claim, description)


@entry_point("encode_config")
def main(cfg: DictConfig) -> None:
    published = cfg.get("backbone")  # a config group: the file itself says nothing of its network
    chosen = {"backbone": published.name, "input_size": published.input_size} if published is not None else {}
    own = {key: cfg[key] for key in cfg if key != "backbone"}
    encode(settings({"backbone": None, "input_size": 112, **own, **chosen}, EncodeSettings, ""))


if __name__ == "__main__":
    main()

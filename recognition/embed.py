"""Embed one image, or a folder of images.

    python -m recognition.embed checkpoint=backbone.safetensors images=face.png output=face.npy
    python -m recognition.embed checkpoint=backbone.safetensors images=photos output=outputs/embeddings align=true

One image: its embedding is described, and written where `output` says. A folder is aligned by align.py's job where that
is asked for, and embedded by encode.py's, so the same command goes on where a killed run ended, and torchrun shares it
out. Settings: configs/recognition_embed_config.yaml.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from recognition.face_input import face_crop, is_crop
from utils import distributed
from utils.alignment import FaceAligner
from utils.alignment_job import REPORT, AlignSettings, run_alignment
from utils.config import UserError, check_writable, entry_point, instantiate, settings
from utils.contexts import save_rows
from utils.embedders import Embedder
from utils.embedding_job import EncodeSettings, run
from utils.images import list_images, resize, to_float
from utils.logging import get_logger

log = get_logger("embed")
ALIGNED = "aligned"  # the folder of crops below `output`


@dataclass
class EmbedSettings:
    """The keys of configs/recognition_embed_config.yaml but for the embedder."""

    checkpoint: str
    images: str
    output: str | None = None
    align: bool = False
    flip: bool = True
    batch_size: int = 64
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size: {self.batch_size}; it must be at least 1")


@entry_point("recognition_embed_config")
def main(cfg: DictConfig) -> None:
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "embedder"])
    options = settings(own, EmbedSettings, "")
    images = Path(options.images).expanduser()
    if images.is_dir():
        folder = output_folder(options.output, images, options.align)
        embed_folder(images, folder, options, instantiate(cfg.embedder, "embedder"))
    elif images.is_file():
        check_output_file(options.output)
        lines = embed_image(images, options, instantiate(cfg.embedder, "embedder"))
        if distributed.is_main():
            sys.stdout.write("".join(f"{line}\n" for line in lines))
    else:
        raise UserError(f"images: no such image or folder: {images}")


def embed_image(image: Path, options: EmbedSettings, embedder: Embedder) -> list[str]:
    """Embed one image file, write options.output where it is set, and describe the embedding, a line each.

    The length before normalising is that of the image itself, without its mirror image: networks give sharp, frontal
    faces longer vectors. Raises UserError where the file cannot be read or no face is found.
    """
    device = distributed.device(options.device)
    crop_sized = is_crop(image, embedder.input_size)
    aligner = FaceAligner(device=device) if options.align and not crop_sized else None
    crop, how = face_crop(image, aligner)
    if aligner is None and not crop_sized:
        log.warning("%s has not the size of an aligned crop; align=true finds and aligns the face first", image)
    (embedding,) = embedder.embed(crop[None], flip=options.flip, device=device)  # (D,)
    pixels = to_float(resize(crop, embedder.input_size)[None]).to(device)  # (1, 3, S, S)
    with torch.inference_mode():
        length = float(embedder.network(pixels).norm())
    lines = [
        how,
        f"embedding: {embedder.width} numbers, of length {length:.3f} before normalising",
        f"first: {' '.join(f'{number:.4f}' for number in embedding[:8])}",
    ]
    if options.output is not None and distributed.is_main():
        save_rows(Path(options.output).expanduser(), embedding)
        lines.append(f"written: {options.output}")
    return lines


def embed_folder(images: Path, output: Path, options: EmbedSettings, embedder: Embedder) -> None:
    """Embed the images below a folder into the folder `output`, aligned before where options.align says so.

    A folder whose images all have the size of crops is not aligned again. Raises UserError as `run_alignment` and
    `utils.embedding_job.run`.
    """
    files = list_images(images)
    if not files:
        raise UserError(f"images: no images in {images}")
    if options.align and not all(is_crop(images / file, embedder.input_size) for file in files):
        aligned = output / ALIGNED
        summary = run_alignment(AlignSettings(str(images), str(aligned), layout="folders", device=options.device))
        if summary["failed"]:
            log.warning(
                "%d of %d images are left out: no face, or unreadable; %s says which",
                *(summary["failed"], summary["images"], aligned / REPORT),
            )
        images = aligned
    encode = EncodeSettings(
        checkpoint=options.checkpoint,
        input_dir=str(images),
        output_dir=str(output),
        flip=options.flip,
        batch_size=options.batch_size,
        device=options.device,
    )
    run(encode, embedder)


def output_folder(output: str | None, images: Path, align: bool) -> Path:
    """The folder for the embeddings of a folder; `output` may also name the embeddings.npy in it.

    UserError where it is not set, is a file of another name, cannot be made, or would put crops among the images.
    """
    if output is None:
        raise UserError(
            f"output: not set; {images} is a folder, so give output=FOLDER for embeddings.npy and its names"
        )
    folder = Path(output).expanduser()
    if folder.name == "embeddings.npy":
        folder = folder.parent
    if folder.suffix == ".npy" or folder.is_file():
        raise UserError(
            f"output: {folder} is one file; {images} is a folder, whose embeddings and names go to a folder"
        )
    check_writable(folder, "output")
    if align and (folder / ALIGNED).resolve().is_relative_to(images.resolve()):
        raise UserError(
            f"output: {folder} lies in images={images}, where its crops would count as images; give another"
        )
    return folder


def check_output_file(output: str | None) -> None:
    """UserError unless `output` is null or a file `.npy` that can be written, before the network is read."""
    if output is None:
        return
    if not output.endswith(".npy") or Path(output).expanduser().is_dir():
        raise UserError(f"output: {output}; the embedding of one image goes to a file .npy")
    check_writable(output, "output")


if __name__ == "__main__":
    main()

"""Put the face of every identity's context among its images: python id_augment.py contexts_dir=... data_dir=...

ADMIS (FRCSyn, CVPR 2024) oversamples the face whose embedding an identity was drawn from, so that the recogniser sees
it more often. Settings: configs/id_augment_config.yaml.
"""

import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from utils import distributed
from utils.checkpoint import write_json
from utils.config import UserError, entry_point, existing_folder, settings
from utils.images import image_size, list_images
from utils.logging import get_logger

RECORD = "id_augment.json"
COPY = re.compile(r"^id_augment_\d+\.png$")  # the names that are ours
SHOWN = 5
log = get_logger("id_augment")


@dataclass
class IdAugmentSettings:
    """The keys of configs/id_augment_config.yaml."""

    contexts_dir: str
    data_dir: str
    copies: int


@dataclass
class Summary:
    """What a data set has got, as id_augment.json keeps it."""

    contexts_dir: str
    copies: int
    identities: int  # folders of the data set
    images: int  # copies in it now
    missing_faces: list[str]  # identities without a face in contexts_dir
    unused_faces: int  # faces without an identity in the data set


def plan(options: IdAugmentSettings) -> tuple[dict[str, Path], Summary]:
    """The face of every identity that has one, and what there will be. UserError where the folders do not fit."""
    faces = existing_folder(
        Path(options.contexts_dir) / "faces",
        "contexts_dir",
        "create_sample_identity_contexts.py source=two_stage keeps its faces there",
    )
    root = existing_folder(options.data_dir, "data_dir", "it holds one folder of images an identity")
    if options.copies < 0:
        raise UserError(f"copies: {options.copies}; give 0 (none, and earlier ones deleted) or more")
    images = [name for name in list_images(root) if "/" in name and not COPY.match(name.rpartition("/")[2])]
    if not images:
        raise UserError(
            f"data_dir: {root} holds no identity folders with images; split_identity_blocks.py makes them of blocks"
        )
    identities = sorted({name.split("/", 1)[0] for name in images})
    known = {path.stem: path for path in sorted(faces.glob("*.png"))}
    found = {identity: known[identity] for identity in identities if identity in known}
    missing = [identity for identity in identities if identity not in known]
    if not found:
        raise UserError(
            f"contexts_dir: none of its {len(known)} faces is named like one of the {len(identities)} identities in "
            f"{root} ({identities[0]}, ...); give the contexts that these were drawn from"
        )
    sizes = image_size(next(iter(found.values()))), image_size(root / images[0])
    if sizes[0] != sizes[1]:
        log.warning(
            "contexts_dir: its faces are %d x %d pixels, the images in data_dir %d x %d",
            *(sizes[0][1], sizes[0][0], sizes[1][1], sizes[1][0]),
        )
    summary = Summary(
        contexts_dir=str(options.contexts_dir),
        copies=options.copies,
        identities=len(identities),
        images=options.copies * len(found),
        missing_faces=missing,
        unused_faces=len(known) - len(found),
    )
    return found, summary


def put_copies(face: Path, folder: Path, copies: int) -> None:
    """Make `folder` hold exactly `copies` copies of `face` under our names; each appears whole or not at all."""
    wanted = [folder / f"id_augment_{number}.png" for number in range(copies)]
    for path in folder.iterdir():
        if COPY.match(path.name) and path not in wanted:
            path.unlink()
    content = face.read_bytes()
    for path in wanted:
        if not (path.is_file() and path.read_bytes() == content):
            unfinished = folder / f".{path.name}.tmp"
            shutil.copyfile(face, unfinished)
            os.replace(unfinished, path)


def augment(options: IdAugmentSettings) -> Summary:
    """Copy the faces into the data set and keep the record; again is the same as once. Run by every process."""
    found, summary = distributed.on_main(lambda: plan(options))
    root = Path(options.data_dir)
    mine = distributed.share(sorted(found))
    for identity in tqdm(mine, desc="copy", unit="identity", disable=not distributed.is_main()):
        put_copies(found[identity], root / identity, options.copies)
    distributed.barrier()
    if distributed.is_main():
        write_json(root / RECORD, asdict(summary))
        if summary.missing_faces:
            log.warning(
                "%d of %d identities have no face in %s: %s%s (all in %s)",
                *(len(summary.missing_faces), summary.identities, options.contexts_dir),
                *(", ".join(summary.missing_faces[:SHOWN]), ", ..." * (len(summary.missing_faces) > SHOWN)),
                root / RECORD,
            )
        log.info(
            "%d copies of %d faces among the images of %d identities in %s; %d faces have no identity there",
            *(summary.images, len(found), summary.identities, root, summary.unused_faces),
        )
    return summary


@entry_point("id_augment_config")
def main(cfg: DictConfig) -> None:
    augment(settings({key: cfg[key] for key in cfg if key != "output_dir"}, IdAugmentSettings, ""))


if __name__ == "__main__":
    main()

"""IJB-B and IJB-C for 1:1 verification of templates, in the files that insightface's evaluation reads.

    <root>/loose_crop/<number>.jpg                     face crops with a margin
    <root>/meta/<set>_name_5pts_score.txt              image, five landmarks x y, score of the detector
    <root>/meta/<set>_face_tid_mid.txt                 image, template, media (photograph or video)
    <root>/meta/<set>_template_pair_label.txt          template, template, 1 for one person

Legend: m images, T templates, P pairs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from utils.alignment import norm_crop
from utils.config import UserError
from utils.data.formats.labelled import EncodedImages, read_lines, whole_numbers
from utils.images import read_bytes

SUFFIXES = ("name_5pts_score.txt", "face_tid_mid.txt", "template_pair_label.txt")


class TemplateImages(EncodedImages):
    """m images in T templates, and P pairs of templates. `pixels` gives the image aligned by its landmarks."""

    format = "templates"

    def __init__(
        self,
        name: str,
        folder: Path,
        names: list[str],
        landmarks: np.ndarray,
        scores: np.ndarray,
        templates: np.ndarray,
        media: np.ndarray,
        pairs: np.ndarray,
        issame: np.ndarray,
    ) -> None:
        """
        Args:
            name: ijbb or ijbc.
            landmarks: (m, 5, 2) float32, pixels of the crop.
            scores: (m,) float32, of the detector.
            templates, media: (m,) int64, numbers of the distribution.
            pairs: (P, 2) int32, numbers of templates.
            issame: (P,) bool.
        """
        super().__init__(folder, names)
        self.name, self.landmarks, self.scores = name, landmarks, scores
        self.templates, self.media, self.pairs, self.issame = templates, media, pairs, issame
        self.files = [self.path / image for image in names]

    def encoded(self, index: int) -> bytes:
        return read_bytes(self.files[index])

    def pixels(self, index: int) -> np.ndarray:
        """Image `index` on the ArcFace template: uint8 (112, 112, 3) RGB; UserError where it cannot be read."""
        return norm_crop(super().pixels(index), self.landmarks[index])


def read_ijb(root: str | Path) -> TemplateImages:
    """Read the lists of IJB-B or IJB-C below `root`; images are opened when they are asked for.

    Raises UserError for missing files, images and templates, for lists that do not fit together, and for landmarks
    that coincide.
    """
    root = Path(root)
    meta = root / "meta" if (root / "meta").is_dir() else root
    heads = sorted(meta.glob(f"*_{SUFFIXES[0]}"))
    if len(heads) != 1:
        state = f"holds {len(heads)} files" if heads else "holds no file"
        raise UserError(f"ijb_dir: {meta} {state} *_{SUFFIXES[0]}; one of IJB-B or IJB-C is wanted")
    name = heads[0].name.removesuffix(f"_{SUFFIXES[0]}")
    images_file, members_file, pairs_file = (meta / f"{name}_{suffix}" for suffix in SUFFIXES)

    names, landmarks, scores = _read_images(images_file)
    templates, media = _read_members(members_file, names)
    pairs, issame = _read_pairs(pairs_file, templates)
    folder = root / "loose_crop"
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [image for image in names if image not in there]
    if missing:
        raise UserError(f"ijb_dir: {folder} lacks {len(missing)} images of {images_file.name}, first {missing[0]}")
    return TemplateImages(name, folder, names, landmarks, scores, templates, media, pairs, issame)


def _read_images(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, landmarks (m, 5, 2), scores (m,)."""
    names, numbers = [], []
    for line_number, line in enumerate(read_lines(path), start=1):
        name, *fields = line.split() or [""]
        try:
            values = [float(field) for field in fields]
        except ValueError:
            values = []
        if len(values) != 11 or not np.isfinite(values).all():
            raise UserError(
                f"{path} line {line_number}: {line[:80]!r}; an image, 10 coordinates and a score are wanted"
            )
        names.append(name)
        numbers.append(values)
    if not names:
        raise UserError(f"{path}: names no images")
    table = np.array(numbers, np.float32)
    landmarks = table[:, :10].reshape(-1, 5, 2)
    spread = landmarks.std(axis=1).max(axis=1)
    if not spread.all():
        raise UserError(f"{path} line {int(spread.argmin()) + 1}: the five landmarks coincide")
    return names, landmarks, table[:, 10]


def _read_members(path: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Templates (m,) and media (m,) of the images, whose lines stand in the order of `names`."""
    lines = read_lines(path)
    if len(lines) != len(names):
        raise UserError(f"{path}: {len(lines)} lines, but the list of landmarks has {len(names)}")
    found = []
    for number, (line, name) in enumerate(zip(lines, names, strict=True), start=1):
        fields = line.split()
        if len(fields) != 3 or fields[0] != name:
            raise UserError(f"{path} line {number}: {line[:80]!r}; {name}, a template and a media number are wanted")
        found.append(whole_numbers(fields[1:], path, number))
    return tuple(np.array(found, np.int64).T)


def _read_pairs(path: Path, templates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (P, 2) int32 and issame (P,); IJB-C has 15.7 million, so the lines are not read one by one."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        table = np.loadtxt(path, dtype=np.int32, ndmin=2)
    except ValueError as error:
        raise UserError(f"{path}: three whole numbers a line are wanted ({str(error).splitlines()[0]})") from error
    if table.shape[1:] != (3,) or not np.isin(table[:, 2], (0, 1)).all():
        raise UserError(f"{path}: two templates and a flag 0 or 1 are wanted in each line")
    issame = table[:, 2] == 1
    if issame.all() or not issame.any():
        raise UserError(f"{path}: {int(issame.sum())} of {len(issame)} pairs are genuine; both kinds are needed")
    pairs = np.ascontiguousarray(table[:, :2])
    unknown = np.setdiff1d(pairs, templates)
    if len(unknown):
        raise UserError(f"{path}: {len(unknown)} templates have no images, first {unknown[0]}")
    return pairs, issame

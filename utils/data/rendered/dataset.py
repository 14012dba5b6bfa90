"""Folders of rendered people: `<output_dir>/<identity:05d>/<image:03d>.png` and `ground_truth.jsonl`."""

import json
import multiprocessing
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.config import UserError
from utils.data.rendered.identity import sample_identity, sample_nuisance
from utils.data.rendered.render import LANDMARKS, render_with_landmarks

GROUND_TRUTH = "ground_truth.jsonl"
_ENCODERS = {
    "png": {"format": "PNG", "compress_level": 1},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}


def image_name(identity: int, image: int, suffix: str = "png") -> str:
    """Path of an image below the output folder."""
    return f"{identity:05d}/{image:03d}.{suffix}"


def _rounded(record: dict) -> dict:
    """Floats to five decimals, so that a line stays short."""

    def short(value):
        if isinstance(value, float):
            return round(value, 5)
        return [short(v) for v in value] if isinstance(value, list | tuple) else value

    return {key: short(value) for key, value in record.items()}


def _render_images(job: tuple) -> list[dict]:
    """Writes the images `wanted` of one person; returns their lines of the ground truth."""
    output_dir, index, wanted, size, seed, strength, suffix = job
    identity = sample_identity(seed, index)
    (Path(output_dir) / f"{index:05d}").mkdir(parents=True, exist_ok=True)
    records = []
    for k in wanted:
        nuisance = sample_nuisance(seed, index, k, strength)
        pixels, landmarks = render_with_landmarks(identity, nuisance, size)
        path = Path(output_dir) / image_name(index, k, suffix)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        Image.fromarray(pixels).save(temporary, **_ENCODERS[suffix])
        os.replace(temporary, path)
        records.append(
            {
                "file": image_name(index, k, suffix),
                "size": size,
                "seed": seed,
                "strength": strength,
                "landmarks": {
                    name: np.round(xy, 2).astype(float).tolist() for name, xy in zip(LANDMARKS, landmarks, strict=True)
                },
                "identity": _rounded(asdict(identity)),
                "nuisance": _rounded(asdict(nuisance)),
            }
        )
    return records


def read_ground_truth(output_dir: str | Path) -> dict[str, dict]:
    """Lines of `ground_truth.jsonl` by file name; a last line torn by a kill is left out."""
    path = Path(output_dir) / GROUND_TRUTH
    records = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.endswith("}"):
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                records[record["file"]] = record
    return records


def render_dataset(
    output_dir: str | Path,
    n_identities: int,
    images_per_identity: int,
    size: int = 128,
    seed: int = 0,
    first_identity: int = 0,
    processes: int | None = None,
    strength: float = 1.0,
    suffix: str = "png",
) -> int:
    """Renders people `first_identity` ... `first_identity + n_identities - 1`, `images_per_identity` photographs each.

    Any image depends on (seed, identity, image) alone. Images that are there already, with their line in the ground
    truth, are kept: the same command resumes. Returns the number of images rendered now.

    Args:
        size: pixels along a side.
        processes: worker processes; None takes every core this process may use, 1 renders in this one.
        strength: of the nuisance, 0 (frontal, neutral) to 1.
        suffix: "png" or "jpg" (quality 95).

    Raises:
        UserError: an argument out of range, or a folder that holds faces of another seed, size or strength.
    """
    for key, value, least in (
        ("n_identities", n_identities, 1),
        ("images_per_identity", images_per_identity, 1),
        ("image_size", size, 32),
        ("seed", seed, 0),
        ("first_identity", first_identity, 0),
    ):
        if value < least:
            raise UserError(f"{key}: found {value}; at least {least} would be right")
    if size % 4:
        raise UserError(f"image_size: found {size}; a multiple of 4 would be right")
    if not 0 <= strength <= 1:
        raise UserError(f"nuisance_strength: found {strength}; a number from 0 to 1 would be right")
    if suffix not in _ENCODERS:
        raise UserError(f"image_format: found {suffix!r}; one of {', '.join(_ENCODERS)} would be right")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    records = read_ground_truth(output_dir)
    for record in records.values():
        for key, value in (("size", size), ("seed", seed), ("strength", strength)):
            if record[key] != value:
                raise UserError(
                    f"output_dir: {output_dir} holds faces of {key} {record[key]}, not {value}; "
                    "another or an empty folder would be right"
                )

    jobs = []
    for index in range(first_identity, first_identity + n_identities):
        names = [image_name(index, k, suffix) for k in range(images_per_identity)]
        wanted = [k for k, name in enumerate(names) if name not in records or not (output_dir / name).exists()]
        if wanted:
            jobs.append((str(output_dir), index, wanted, size, seed, strength, suffix))
    n_images = sum(len(job[2]) for job in jobs)
    path = output_dir / GROUND_TRUTH
    processes = min(processes or len(os.sched_getaffinity(0)), max(len(jobs), 1))
    with open(path, "a", encoding="utf-8") as file, tqdm(total=n_images, desc="rendering", unit="image") as bar:
        file.write("\n")  # ends a line that a kill may have torn

        def keep(new: list[dict]) -> None:
            for record in new:
                records[record["file"]] = record
                file.write(json.dumps(record) + "\n")
            file.flush()
            bar.update(len(new))

        if processes == 1:
            for job in jobs:
                keep(_render_images(job))
        else:
            with _pool(processes) as pool:
                for new in pool.imap_unordered(_render_images, jobs, chunksize=1):
                    keep(new)

    # Sorted, so that the file does not depend on the number of processes
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(json.dumps(records[name]) + "\n" for name in sorted(records)), encoding="utf-8")
    os.replace(temporary, path)
    return n_images


def _pool(processes: int):
    """Workers with one thread each: the arrays are small, and the processes already fill the machine."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in threads}
    os.environ.update(dict.fromkeys(threads, "1"))  # read when a worker imports numpy, hence "spawn"
    try:
        return multiprocessing.get_context("spawn").Pool(processes)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

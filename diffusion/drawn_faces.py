"""The faces behind new contexts: drawn, aligned, filtered, embedded and kept, by any number of processes.

Candidate number k is fixed by (seed, k): its noise comes from a generator of its own.

    <output_dir>/.candidates/settings.json      what decides a candidate
    <output_dir>/.candidates/batch_<k>.npz      a drawn batch: numbers, verdicts, embeddings; written after its faces
    <output_dir>/.candidates/faces/<k>.png      a usable face, as it was embedded
    <output_dir>/faces/<name>.png               in the end: the face of every context

Legend: b candidates of a batch, k of them usable, H W height and width, D width of an embedding.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from diffusion.drawing import FaceDrawer, Job
from diffusion.drawing_settings import DrawingSettings
from diffusion.generator import CheckpointChoice, FaceGenerator
from diffusion.samplers import Sampler
from diffusion.sampling_run import image_seed
from utils import distributed
from utils.alignment import Detection, FaceAligner, alignment_error
from utils.checkpoint import read_json, write_atomically, write_json
from utils.config import UserError
from utils.context_sources import Candidates
from utils.embedders import Embedder
from utils.images import write_image
from utils.precision import warn_of_emulation

NO_FACE, UNSURE, SEVERAL, MISFIT = "no face found", "low detection probability", "several faces", "far from frontal"


@dataclass
class DetectionSettings:
    """The section `source.align`: how faces are found, and which are good enough."""

    min_face_size: float = 20  # pixels, as the detector sees the image (after detection_size)
    detection_size: int = 112  # images whose shorter side is smaller are enlarged to it for the detector
    detection_padding: float = 0.1  # edge pixels repeated around the image, as a share of the shorter side
    min_probability: float = 0.95  # least probability that the detector gives a face
    max_faces: int = 1  # most faces in an image
    max_misfit: float = 6.0  # most distance of aligned landmarks from the template, RMS in pixels of 112

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        for key, least, most in (
            ("min_face_size", 1, np.inf),
            ("detection_size", 1, np.inf),
            ("detection_padding", 0, np.inf),
            ("min_probability", 0, 1),
            ("max_faces", 1, np.inf),
            ("max_misfit", 0, np.inf),
        ):
            value = getattr(self, key)
            if not least <= value <= most:
                raise UserError(f"source.align.{key}: {value}; give {least} {'or more' if most > 1 else f'to {most}'}")

    def fault(self, detection: Detection) -> str:
        """Why the face in an image is not good enough for a context; empty where it is."""
        if detection.landmarks is None:
            return NO_FACE
        if detection.probability < self.min_probability:
            return UNSURE
        if detection.faces > self.max_faces:
            return SEVERAL
        return MISFIT if alignment_error(detection.landmarks) > self.max_misfit else ""


@dataclass
class DrawnFacesSettings:
    """The keys of configs/source/two_stage.yaml."""

    checkpoint: CheckpointChoice
    recogniser: str  # file of the network that the section `embedder` describes
    VQDecoder_path: str | None = None
    latent_diffusion: bool | None = None
    latent_shape: list[int] | None = None
    model_cfg_path: str | None = None
    diffusion_cfg_path: str | None = None
    image_size: int | None = None  # side of the drawn images in pixels; null: as decoded
    precision: str = "fp32"
    align: Any = None  # DetectionSettings; null: drawn faces are aligned already
    flip: bool = True  # embed the mirror image too
    batch_size: int = 64  # images a process draws at a time
    device: str = "auto"


class DrawnFaces:
    """The source of contexts (utils.context_sources.ContextSource) that draws faces."""

    count = None

    def __init__(
        self,
        generator: FaceGenerator,
        sampler: Sampler,
        embedder: Embedder,
        detection: DetectionSettings | None,
        cfg: DrawnFacesSettings,
        seed: int,
        output_dir: Path,
    ) -> None:
        self.generator, self.sampler, self.embedder, self.cfg, self.seed = generator, sampler, embedder, cfg, seed
        self.detection = detection
        self.device = distributed.device(cfg.device)
        self.folder = output_dir / ".candidates"
        self.width = embedder.width
        self.least = cfg.batch_size * distributed.world_size()
        self.inputs = {"source.checkpoint": generator.weights_sha256, "source.recogniser": embedder.sha256}
        self.settings = {
            "source.latent_shape": list(generator.latent_shape),
            "sampler": type(sampler).__name__,
            **{f"sampler.{name}": value for name, value in asdict(sampler).items()},
            "source.image_size": cfg.image_size,
            "source.precision": cfg.precision,
            "source.flip": cfg.flip,
            "source.align": None if detection is None else asdict(detection),
        }
        self._next = 0  # number of the next candidate
        self._is_ready = False
        self._read: set[Path] = set()  # batches, first process
        self._drawn: dict[int, dict[str, Any]] = {}  # candidates by number, first process

    def draw(self, count: int) -> Candidates:
        """The next `count` candidates: those that an earlier run left, and the others drawn by all processes."""
        numbers = range(self._next, self._next + count)
        self._next += count
        batches = distributed.on_main(lambda: self._missing(numbers))
        mine = distributed.share(batches)
        bar = tqdm(
            total=sum(len(batch) for batch in mine),
            desc="drawing faces",
            unit="image",
            disable=not distributed.is_main() or not mine,
        )
        with bar:
            for batch in mine:
                self._make(batch)
                bar.update(len(batch))
        distributed.barrier()
        if not distributed.is_main():
            return Candidates(np.empty((0, self.width), np.float32), [])
        self._read_batches()
        found = [self._drawn.pop(number) for number in numbers]
        rows = [entry["row"] for entry in found if not entry["reason"]]
        return Candidates(
            np.stack(rows) if rows else np.empty((0, self.width), np.float32),
            [entry["origin"] for entry in found],
            [entry["reason"] for entry in found],
        )

    def finish(self, output_dir: Path, names: Sequence[str], chosen: Sequence[int]) -> None:
        """Put the face of every context into <output_dir>/faces, whole or not at all."""
        unfinished, faces = output_dir / ".faces.tmp", output_dir / "faces"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, number in zip(names, chosen, strict=True):
            shutil.copyfile(self._face(number), unfinished / f"{name}.png")
        shutil.rmtree(faces, ignore_errors=True)
        unfinished.rename(faces)

    def clean(self) -> None:
        """Delete the candidates."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _missing(self, numbers: range) -> list[list[int]]:
        """What is to be drawn so that all of `numbers` are there, in batches that begin at multiples of batch_size.

        So a batch holds the same candidates for any number of processes.
        """
        if not self._read and not self._drawn:
            self._claim()
        self._read_batches()
        size = self.cfg.batch_size
        batches = []
        for start in range(numbers.start // size * size, numbers.stop, size):
            batch = range(max(start, numbers.start), start + size)
            todo = [number for number in batch if number not in self._drawn]
            if todo:
                batches.append(todo)
        return batches

    def _claim(self) -> None:
        """Keep what decides a candidate, or check that candidates of a killed run were made with the same."""
        file = self.folder / "settings.json"
        now = {"seed": self.seed, **self.settings, **self.inputs}
        now = json.loads(json.dumps(now))  # what a file keeps
        if file.is_file():
            was = read_json(file, "give another output_dir")
            for key in sorted({*was, *now}):
                before, after = was.get(key), now.get(key)
                if before != after:
                    told = "another file than before" if key in self.inputs else f"{after}, before {before}"
                    raise UserError(
                        f"{key}: {told}; {self.folder.parent} holds faces drawn with it: give another output_dir, or "
                        "delete it"
                    )
        write_json(file, now)

    def _make(self, numbers: Sequence[int]) -> None:
        """Draw, align, filter and embed these candidates, and write them: faces first, then their batch."""
        if not self._is_ready:
            self._load_networks()
        seeds = [image_seed(self.seed, "context", number) for number in numbers]
        images = draw_images(self._drawer, seeds)  # uint8 (b, H, W, 3)
        faces, reasons, measures = self._align(images)
        usable = [row for row, reason in enumerate(reasons) if not reason]
        rows = np.empty((0, self.width), np.float32)
        if usable:
            crops = np.stack([faces[row] for row in usable])  # uint8 (k, H, W, 3)
            rows = self.embedder.embed(crops, flip=self.cfg.flip, device=self.device)  # (k, D)
        for row in usable:
            write_image(self._face(numbers[row]), faces[row])
        arrays = {
            "numbers": np.array(numbers),
            "seeds": np.array(seeds),
            "reasons": np.array(reasons),
            "measures": measures,
            "rows": rows,
        }

        def save(temporary: Path) -> None:
            with temporary.open("wb") as file:  # given a path, np.savez would append .npz to it
                np.savez(file, **arrays)

        write_atomically(self.folder / f"batch_{numbers[0]:09d}.npz", save)

    def _load_networks(self) -> None:
        """Move them to the device; once, when there is something to draw."""
        warn_of_emulation(self.cfg.precision, self.device)
        settings = DrawingSettings(max_samples=self.cfg.batch_size, precision=self.cfg.precision)
        generator = self.generator.to(self.device)
        self._drawer = FaceDrawer(generator, self.sampler, settings, image_size=self.cfg.image_size)
        if self.detection is not None:
            self._aligner = FaceAligner(
                min_face_size=self.detection.min_face_size,
                detection_size=self.detection.detection_size,
                detection_padding=self.detection.detection_padding,
                device=self.device,
            )
        self._is_ready = True

    def _align(self, images: np.ndarray) -> tuple[list[np.ndarray | None], list[str], np.ndarray]:
        """Faces as they are embedded, why some are no good, and (b, 2) probability and misfit (nan: none)."""
        if self.detection is None:
            return list(images), [""] * len(images), np.full((len(images), 2), np.nan)
        aligned = self._aligner.align(list(images))
        measures = [
            (np.nan, np.nan) if found.landmarks is None else (found.probability, alignment_error(found.landmarks))
            for _, found in aligned
        ]
        return [face for face, _ in aligned], [self.detection.fault(found) for _, found in aligned], np.array(measures)

    def _face(self, number: int) -> Path:
        return self.folder / "faces" / f"{number:09d}.png"

    def _read_batches(self) -> None:
        """Take in the batches written since the last time."""
        for path in sorted(set(self.folder.glob("batch_*.npz")) - self._read):
            with np.load(path, allow_pickle=False) as arrays:
                rows = iter(arrays["rows"])
                columns = (arrays[key].tolist() for key in ("numbers", "seeds", "reasons", "measures"))
                for number, seed, reason, measures in zip(*columns, strict=True):
                    named = zip(("probability", "misfit"), measures, strict=True)
                    origin = {"seed": seed, **{key: round(value, 4) for key, value in named if value == value}}
                    row = None if reason else next(rows)
                    self._drawn[number] = {"reason": reason, "origin": origin, "row": row}
            self._read.add(path)


def draw_images(drawer: FaceDrawer, seeds: Sequence[int]) -> np.ndarray:
    """An image without a context from each seed, in their order: uint8 (b, H, W, 3)."""
    drawn = drawer.draw(Job(row, seed) for row, seed in enumerate(seeds))
    return np.stack([one.image for one in sorted(drawn, key=lambda one: one.key)])

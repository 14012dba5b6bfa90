"""The demo's stages, in order. Each calls the scripts that a user calls; demo_config.yaml says with which settings.

Folders below output_dir:
    faces/{train,test}        people, rendered or imported             aligned/{train,test}  their faces, 112 x 112
    verification/             test faces and pairs in LFW's form       embeddings/           of the training faces
    autoencoder/ diffusion/   the generator                            identities/           contexts of new people
    samples/ generated/       faces as drawn; aligned, a folder each   recognisers/ tests/   of every training set
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from demo import people
from utils.checkpoint import read_json
from utils.config import UserError, plain, settings
from utils.contexts import gaussian_contexts, read_contexts, write_rows
from utils.images import default_threads, list_images
from utils.stages import Commands, Stages, path_for_scripts

SCRIPTS = ("render", "align", "recogniser", "autoencoder", "diffusion", "sampling", "two_stage", "one_stage")
GENERATED = ("two_stage", "one_stage")
# Backbone settings are needed again to build the untrained network; everything else of the recipe is about training.
BACKBONE_KEY = "backbone"


@dataclass
class PeopleSettings:
    """Who is rendered, or at most taken from the user's folders."""

    train: int
    images_per_person: int
    test: int
    images_per_test_person: int
    image_size: int


@dataclass
class PairSettings:
    """The verification pairs of the test people."""

    genuine: int
    folds: int


@dataclass
class IdentitySettings:
    """The new identities that are drawn."""

    count: int
    images: int
    max_similarity: float | None


class Pipeline:
    """Settings, checked before anything runs, and the stages."""

    def __init__(self, cfg: DictConfig, output_dir: Path) -> None:
        self.people = settings(cfg.people, PeopleSettings, "people")
        self.pairs = settings(cfg.pairs, PairSettings, "pairs")
        self.identities = settings(cfg.identities, IdentitySettings, "identities")
        self.scripts: dict[str, dict[str, Any]] = {name: plain(cfg[name]) for name in SCRIPTS}
        self.seed = int(cfg.seed)
        self.processes = min(int(cfg.processes), torch.cuda.device_count() or default_threads())
        self.data = None if cfg.data is None else Path(str(cfg.data)).expanduser()
        self.found = None if self.data is None else people.read_class_folders(self.data)
        self.reference = "rendered" if self.data is None else "real"
        self.sets = (self.reference, *GENERATED)
        self.output_dir = output_dir
        self.stages = Stages(output_dir, default_threads(), "`make demo`")
        needed = 2 * self.pairs.folds
        if self.data is None and self.people.test < needed:
            raise UserError(f"people.test: {self.people.test}; {self.pairs.folds} folds need at least {needed} people")

    def path(self, name: str) -> str:
        """A path below output_dir, as the scripts take it."""
        return path_for_scripts(self.output_dir / name)

    def run(self) -> None:
        """All stages but the report."""
        self._faces()
        self._align_people()
        self._pairs()
        self._recogniser(self.reference, "aligned/train")
        self._embed()
        self._autoencoder()
        self._diffusion()
        self._new_identities()
        for name in GENERATED:
            self._sample(name)
        self._align_samples()
        for name in GENERATED:
            self._recogniser(name, f"generated/{name}")
        self._test()

    def _faces(self) -> None:
        def render(run: Commands) -> str:
            common = {"image_size": self.people.image_size, "seed": self.seed}
            for part, count, first, images in (
                ("train", self.people.train, 0, self.people.images_per_person),
                ("test", self.people.test, self.people.train, self.people.images_per_test_person),
            ):
                who = {"n_identities": count, "first_identity": first, "images_per_identity": images}
                folder = {"output_dir": self.path(f"faces/{part}")}
                run.script("-m utils.data.rendered", folder, who, common, self.scripts["render"])
            return f"{count_text(self.output_dir / 'faces/train')} to learn from, {self.people.test} more to test on"

        def copy(run: Commands) -> str:
            train, test = people.split_people(sorted(self.found), self.people.train, self.people.test, self.seed)
            for part, chosen, most in (
                ("train", train, self.people.images_per_person),
                ("test", test, self.people.images_per_test_person),
            ):
                people.import_people(self.data, self.found, chosen, self.output_dir / "faces" / part, most)
            return f"{count_text(self.output_dir / 'faces/train')} to learn from, {len(test)} more to test on"

        size = [vars(self.people), self.seed, self.scripts["render"]]
        if self.data is None:
            self.stages.run("render", "Render people", size, ["faces"], render)
        else:
            key = [*size, str(self.data.resolve()), self.found]
            self.stages.run("import", "Copy faces, hold people out", key, ["faces"], copy)

    def _align_people(self) -> None:
        def work(run: Commands) -> str:
            found = []
            for part, extra in (("train", {}), ("test", {"just_resize_if_fail": True})):
                folders = {"input_dir": self.path(f"faces/{part}"), "output_dir": self.path(f"aligned/{part}")}
                run.script("align.py", folders, extra, self.scripts["align"])
                found.append(f"{100 * read_json(self.output_dir / 'aligned' / part / ALIGNMENT)['rate']:.1f} %")
            return f"a face found in {found[0]} of the training and {found[1]} of the test images"

        self.stages.run("align", "Find and align their faces", self.scripts["align"], ["aligned"], work)

    def _pairs(self) -> None:
        def work(run: Commands) -> str:
            numbers = people.name_as_lfw(self.output_dir / "aligned/test", self.output_dir / "verification/faces")
            folds = people.draw_pairs(numbers, self.pairs.folds, self.pairs.genuine, self.seed)
            people.write_pairs(self.output_dir / "verification/pairs.txt", folds)
            count = len(folds) * len(folds[0][0])
            return f"{count} genuine and {count} impostor pairs in {len(folds)} folds"

        self.stages.run("pairs", "Draw verification pairs", vars(self.pairs), ["verification"], work)

    def _recogniser(self, name: str, faces: str) -> None:
        def work(run: Commands) -> str:
            given = {"dataset.root": self.path(faces), "output_dir": self.path(f"recognisers/{name}")}
            run.script("-m recognition.train", given, self.scripts["recogniser"], processes=self.processes)
            metrics = read_json(self.output_dir / "recognisers" / name / "metrics.json")
            return f"{metrics['steps']} steps, training accuracy {100 * metrics['training_accuracy']:.1f} %"

        title = f"Train a recogniser on {SET_NAMES[name]}"
        self.stages.run(f"recogniser_{name}", title, self.scripts["recogniser"], [f"recognisers/{name}"], work)

    def _embed(self) -> None:
        def work(run: Commands) -> str:
            checkpoint = self.path(f"recognisers/{self.reference}/backbone.safetensors")
            folders = {"input_dir": self.path("aligned/train"), "output_dir": self.path("embeddings")}
            run.script("encode.py", {"checkpoint": checkpoint}, folders)
            names, contexts = read_contexts(self.output_dir / "embeddings/contexts.npy")
            return f"{len(names)} contexts, {contexts.shape[1]} wide"

        self.stages.run("embed", "Embed the training faces", None, ["embeddings"], work)

    def _autoencoder(self) -> None:
        def work(run: Commands) -> str:
            given = {"dataset.samples_root": self.path("aligned/train"), "output_dir": self.path("autoencoder")}
            run.script("train_autoencoder.py", given, self.scripts["autoencoder"], processes=self.processes)
            metrics = read_json(self.output_dir / "autoencoder/metrics.json")
            return f"{metrics['steps']} steps, L1 {metrics['l1']:.3f} on held-out images (range -1 to 1)"

        self.stages.run("autoencoder", "Train the autoencoder", self.scripts["autoencoder"], ["autoencoder"], work)

    def _diffusion(self) -> None:
        def work(run: Commands) -> str:
            _, contexts = read_contexts(self.output_dir / "embeddings/contexts.npy")
            given = {
                "dataset": "folder",
                "dataset.samples_root": self.path("aligned/train"),
                "dataset.embeddings_file_path": self.path("embeddings/embeddings.npy"),
                "model.context_input_channels": contexts.shape[1],
                "training.checkpoint.VQEncoder": self.path("autoencoder/vq_encoder.safetensors"),
                "training.checkpoint.VQDecoder": self.path("autoencoder/vq_decoder.safetensors"),
                "output_dir": self.path("diffusion"),
            }
            run.script("main.py", given, self.scripts["diffusion"], processes=self.processes)
            last = read_lines(self.output_dir / "diffusion/metrics.jsonl")[-1]
            return f"{last['step']} steps, loss {last['loss']:.3f}"

        self.stages.run("diffusion", "Train the diffusion model", self.scripts["diffusion"], ["diffusion"], work)

    def _new_identities(self) -> None:
        def work(run: Commands) -> str:
            _, known = read_contexts(self.output_dir / "embeddings/contexts.npy")
            contexts = gaussian_contexts(
                known, self.identities.count, seed=self.seed, max_similarity=self.identities.max_similarity
            )
            folder, names = self.output_dir / "identities", [f"new_{k:04d}" for k in range(len(contexts))]
            write_rows(folder / "contexts.npy", folder / "context_names.txt", names, contexts)
            nearest = (contexts @ known.T).max(axis=1)
            return f"{len(contexts)} new contexts; nearest training person at cosine {np.median(nearest):.2f} (median)"

        self.stages.run("identities", "Invent identities", vars(self.identities), ["identities"], work)

    def _sample(self, name: str) -> None:
        own = [self.scripts["sampling"], self.scripts[name]]

        def work(run: Commands) -> str:
            given = {
                "checkpoint.path": self.path("diffusion"),
                "VQDecoder_path": self.path("autoencoder/vq_decoder.safetensors"),
                "sampling.contexts_file": self.path("identities/contexts.npy"),
                "sampling.save_dir": self.path(f"samples/{name}"),
                "sampling.n_samples_per_context": self.identities.images,
                "sampling.seed": self.seed,
            }
            run.script("sample.py", given, *own, processes=self.processes)
            return f"{len(read_lines(self.output_dir / 'samples' / name / 'manifest.jsonl'))} images"

        title = f"Draw faces, {SET_NAMES[name].partition(', ')[2]}"
        self.stages.run(f"sample_{name}", title, own, [f"samples/{name}"], work)

    def _align_samples(self) -> None:
        in_blocks = {n: self.scripts[n].get("sampling", {}).get("save_mode") == "blocks" for n in GENERATED}

        def work(run: Commands) -> str:
            found = []
            for name, blocks in in_blocks.items():
                aligned = f"samples/{name}_aligned" if blocks else f"generated/{name}"
                folders = {"input_dir": self.path(f"samples/{name}"), "output_dir": self.path(aligned)}
                run.script("align.py", folders, self.scripts["align"])
                if blocks:
                    folders = {"input_dir": self.path(aligned), "output_dir": self.path(f"generated/{name}")}
                    run.script("split_identity_blocks.py", folders)
                found.append(f"{100 * read_json(self.output_dir / aligned / ALIGNMENT)['rate']:.1f} %")
            return f"a face found in {found[0]} of the two-stage and {found[1]} of the one-stage images"

        folders = ["generated", *(f"samples/{name}_aligned" for name, blocks in in_blocks.items() if blocks)]
        self.stages.run("align_samples", "Align what was drawn, split the blocks", self.scripts["align"], folders, work)

    def _test(self) -> None:
        def work(run: Commands) -> str:
            given = {
                "dataset.root": self.path("verification/faces"),
                "pairs_file": self.path("verification/pairs.txt"),
                "seed": self.seed,
            }
            for name in self.sets:
                own = {
                    "checkpoint": self.path(f"recognisers/{name}/backbone.safetensors"),
                    "output_dir": self.path(f"tests/{name}"),
                }
                run.script("-m recognition.test", own, given)
            backbone = {k: v for k, v in self.scripts["recogniser"].items() if k.split(".")[0] == BACKBONE_KEY}
            untrained = {"checkpoint": None, "output_dir": self.path("tests/untrained")}
            run.script("-m recognition.test", untrained, given, backbone)
            found = read_json(self.output_dir / "tests/two_stage/results.json")
            return f"two-stage: {100 * found['accuracy']:.1f} %"

        self.stages.run("test", "Test all of them on people never seen", None, ["tests"], work)


ALIGNMENT = "alignment_summary.json"
SET_NAMES = {
    "rendered": "the rendered faces",
    "real": "the faces given",
    "two_stage": "generated faces, two-stage",
    "one_stage": "generated faces, one-stage",
}


def count_text(folder: Path) -> str:
    """`280 people, 3,080 images`."""
    names = list_images(folder)
    return f"{len({name.rpartition('/')[0] for name in names}):,} people with {len(names):,} images"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]

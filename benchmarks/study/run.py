"""Running a study: the scripts of every variant, each stage once, skipped where it is done.

Folders below output_dir, for every variant:
    <variant>/settings.json       what it is made with; other settings are refused
    <variant>/samples/            as sample.py wrote them     faces/       aligned, where align.py runs
    <variant>/evaluation/         what evaluate.py finds in them, and its report
    <variant>/recognisers/seed_0/ ...                         tests/       of all seeds
    <variant>/stages/             stamps: seconds and commands
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.study.results import VariantResult
from benchmarks.study.settings import Plan, Variant
from evaluation.report import write_report
from evaluation.results import SetResult
from recognition.test import read_results
from recognition.training_outputs import BACKBONE_FILE
from utils.checkpoint import read_json, write_json
from utils.config import UserError, differences
from utils.folder_lock import FolderLock
from utils.images import default_threads
from utils.logging import get_logger
from utils.stages import Commands, StageRecord, Stages, path_for_scripts

log = get_logger(__name__)

SETTINGS, RESULT = "settings.json", "result.json"
AGAIN = "`python -m benchmarks.study`"


class Study:
    """The variants of a plan in a folder."""

    def __init__(self, plan: Plan, output_dir: Path) -> None:
        """Raises UserError where a variant's folder holds what was made with other settings."""
        self.plan = plan
        self.output_dir = output_dir
        self.threads = default_threads()
        for variant in plan.variants:
            self._check_folder(variant)

    def run(self) -> Iterator[list[VariantResult]]:
        """Run the chosen variants; after each, the results of all variants that are complete."""
        for variant in self.plan.chosen:
            lock = FolderLock(self.output_dir / variant.name, "output_dir")
            lock.acquire()
            try:
                write_json(self.output_dir / variant.name / SETTINGS, self.plan.settings_of(variant))
                VariantRun(self, variant).run()
            finally:
                lock.release()
            yield self._collect()

    def write_report(self, done: Sequence[VariantResult], path: Path) -> None:
        """One report of the faces of all these variants, side by side; none where there are none."""
        folders = {row.title: self.output_dir / row.name / "evaluation" / row.name for row in done}
        results = [replace(SetResult.load(folder), name=title) for title, folder in folders.items()]
        if results:
            write_report(results, path)

    def _check_folder(self, variant: Variant) -> None:
        file = self.output_dir / variant.name / SETTINGS
        if not file.is_file():
            return
        wanted = json.loads(json.dumps(self.plan.settings_of(variant)))  # what a file keeps: lists for tuples
        if changed := sorted(differences(read_json(file), wanted)):
            raise UserError(
                f"output_dir: {file.parent} was made with other settings ({', '.join(changed)}); give another "
                "output_dir, or delete that folder to do it anew"
            )

    def _collect(self) -> list[VariantResult]:
        """Results of the variants that have been trained with all the seeds, in their order."""
        found = []
        for variant in self.plan.variants:
            file = self.output_dir / variant.name / RESULT
            if file.is_file():
                result = VariantResult(**read_json(file))
                if list(result.accuracy) == [str(seed) for seed in self.plan.options.seeds]:
                    found.append(result)
        return found


class VariantRun:
    """The stages of one variant."""

    def __init__(self, study: Study, variant: Variant) -> None:
        self.plan, self.variant = study.plan, variant
        self.folder = study.output_dir / variant.name
        self.threads = study.threads
        self.faces = "samples" if self.plan.align is None else "faces"
        self.records: list[StageRecord] = []

    def path(self, name: str) -> str:
        """A path in the variant's folder, as the scripts take it."""
        return path_for_scripts(self.folder / name)

    def run(self) -> None:
        """All stages, then result.json."""
        stages = self._stages(self.folder)
        self._sample(stages)
        if self.plan.align is not None:
            self._align(stages)
        self._evaluate(stages)
        for seed in self.plan.options.seeds:
            self._train(seed)
        self._test()
        row = self.variant.published
        tested = self._reports()[0]["sets"]
        result = VariantResult(
            name=self.variant.name,
            title=self.variant.title,
            accuracy=dict(zip(map(str, self.plan.options.seeds), self._accuracy(), strict=True)),
            sets=list(tested),
            num_pairs=sum(found["num_genuine"] + found["num_impostor"] for found in tested.values()),
            metrics=self._figures(),
            seconds=sum(record.seconds for record in self.records),
            published=None if row is None else {"name": row.name, "mean": row.mean, "source": row.source},
        )
        write_json(self.folder / RESULT, vars(result))

    def _stages(self, folder: Path) -> Stages:
        return Stages(folder, self.threads, AGAIN)

    def _sample(self, stages: Stages) -> None:
        def work(run: Commands) -> str:
            run.script("sample.py", self.variant.sample, {"sampling.save_dir": self.path("samples")}, **self._shared)
            dataset = read_json(self.folder / "samples/dataset.json")
            return f"{dataset['images']} images of {dataset['identities']} people"

        title = f"{self.variant.title}: draw faces"
        self.records.append(stages.run("sample", title, self.variant.drawn_with, ["samples"], work))

    def _align(self, stages: Stages) -> None:
        def work(run: Commands) -> str:
            folders = {"input_dir": self.path("samples"), "output_dir": self.path("faces")}
            run.script("align.py", self.plan.align, folders)
            summary = read_json(self.folder / "faces/alignment_summary.json")
            return f"a face found in {100 * summary['rate']:.1f} %"

        title = f"{self.variant.title}: align them"
        self.records.append(stages.run("align", title, self.plan.align, ["faces"], work))

    def _evaluate(self, stages: Stages) -> None:
        def work(run: Commands) -> str:
            own = {"root": self.path(self.faces), "name": self.variant.name, "samples_dir": self.path("samples")}
            folders = {"data": own, "output_dir": self.path("evaluation")}
            run.script("evaluate.py", self.plan.evaluate, folders, **self._shared)
            found = self._figures()
            return f"C_intra {100 * found['c_intra']:.1f} %, U_class {100 * found['u_class']:.1f} %"

        title = f"{self.variant.title}: evaluate them"
        self.records.append(stages.run("evaluate", title, self.plan.evaluate, ["evaluation"], work))

    def _figures(self) -> dict[str, float | int | None]:
        """By the keys of evaluation.definitions."""
        found = read_json(self.folder / "evaluation/metrics.json")
        return found["sets"][self.variant.name]["metrics"]

    def _train(self, seed: int) -> None:
        name = f"seed_{seed}"

        def work(run: Commands) -> str:
            own = {"dataset.root": self.path(self.faces), "output_dir": self.path(f"recognisers/{name}")}
            run.script("-m recognition.train", self.plan.train, own, {"training.seed": seed}, **self._shared)
            metrics = read_json(self.folder / "recognisers" / name / "metrics.json")
            return f"{metrics['steps']} steps, training accuracy {100 * metrics['training_accuracy']:.1f} %"

        # A line of its own: another list of seeds leaves the others' recognisers as they are
        stages = self._stages(self.folder / "recognisers")
        title = f"{self.variant.title}: train a recogniser, seed {seed}"
        self.records.append(stages.run(name, title, self.plan.train, [name], work))

    def _test(self) -> None:
        seeds = self.plan.options.seeds

        def work(run: Commands) -> str:
            checkpoints = [self.path(f"recognisers/seed_{seed}/{BACKBONE_FILE}") for seed in seeds]
            own = {"checkpoint": checkpoints, "output_dir": self.path("tests")}
            run.script("-m recognition.test", self.plan.test, own)
            return ", ".join(f"{100 * accuracy:.2f} %" for accuracy in self._accuracy())

        title = f"{self.variant.title}: test on people never seen"
        stages = self._stages(self.folder)
        self.records.append(stages.run("test", title, [self.plan.test, seeds], ["tests"], work))

    def _accuracy(self) -> list[float]:
        """Of every seed, 0 .. 1: the plain mean over the sets that it was tested on."""
        return [mean(found["accuracy"] for found in report["sets"].values()) for report in self._reports()]

    def _reports(self) -> list[dict[str, Any]]:
        return read_results(str(self.folder / "tests"))[0]

    @property
    def _shared(self) -> dict[str, int]:
        return {"processes": self.plan.options.processes}

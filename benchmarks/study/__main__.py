"""`python -m benchmarks.study`: draw, prepare, evaluate, train and test every variant; table, picture, report.

Settings: configs/study_config.yaml. A stopped study goes on with the same command; a complete one rewrites its table.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from benchmarks.study.plot import plot_study
from benchmarks.study.results import markdown, to_json
from benchmarks.study.run import Study
from benchmarks.study.settings import check
from utils.checkpoint import write_json, write_text
from utils.config import entry_point

FILES = ("study.md", "study.json", "study.png", "report.html")


@entry_point("study_config")
def main(cfg: DictConfig) -> None:
    output_dir = Path(cfg.output_dir)
    plan = check(cfg)
    study = Study(plan, output_dir)
    for done in study.run():  # the table of what there is, after every variant
        write_text(output_dir / "study.md", markdown(done))
        write_json(output_dir / "study.json", to_json(done))
        plot_study(done, output_dir / "study.png")
    study.write_report(done, output_dir / "report.html")
    sys.stdout.write(f"\n{markdown(done)}\n")
    sys.stdout.write("".join(f"{output_dir / name}\n" for name in FILES))


if __name__ == "__main__":
    main()

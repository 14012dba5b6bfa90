"""`python -m demo` (or `make demo`): the whole pipeline, then outputs/demo/report.html and metrics.json.

Settings: configs/demo_config.yaml. A stopped demo goes on where it was; a complete one writes its report again.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from demo.collect import write_report
from demo.pipeline import Pipeline
from utils.config import entry_point


@entry_point("demo_config")
def main(cfg: DictConfig) -> None:
    pipeline = Pipeline(cfg, Path(cfg.output_dir))
    pipeline.run()
    table = write_report(pipeline)
    if pipeline.stages.ran == 0:
        sys.stdout.write(f"Everything was complete already; rm -r {pipeline.path('.')} starts over.\n")
    sys.stdout.write(f"\n{table}\nreport:  {pipeline.path('report.html')}\nnumbers: {pipeline.path('metrics.json')}\n")


if __name__ == "__main__":
    main()

"""Evaluate generated data sets: python evaluate.py data.root=... embedder.checkpoint=... output_dir=...

Consistency, uniqueness, diversity, realism, leakage and more, in metrics.json and report.html, and a curated copy on
request. Under torchrun the images are shared out, and the same command goes on where a stopped run ended.
Settings: configs/evaluate_config.yaml.
"""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from evaluation.run import evaluate, open_sets
from evaluation.settings import EvaluationSettings
from evaluation.verdict import is_published
from utils.config import entry_point, instantiate, settings


def run(cfg: DictConfig, choice: str | None) -> None:
    """Check everything, then evaluate. `choice`: which file of configs/embedder/ the embedder's section is."""
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in ("embedder", "features")])
    options = settings(own, EvaluationSettings, "")
    options.check()
    sets = open_sets(options)
    features = instantiate(cfg.features, "features")
    embedder = instantiate(cfg.embedder, "embedder")
    checkpoint = str(cfg.embedder.checkpoint)
    facts = {
        "name": f"{choice}, {checkpoint}",
        "sha256": embedder.sha256,
        "is_published": is_published(choice, checkpoint),
    }
    evaluate(options, sets, embedder, features, facts)


@entry_point("evaluate_config")
def main(cfg: DictConfig) -> None:
    run(cfg, HydraConfig.get().runtime.choices.get("embedder"))


if __name__ == "__main__":
    main()

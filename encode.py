"""Embed a folder of faces: python encode.py checkpoint=... input_dir=... output_dir=... (configs/encode_config.yaml).

The recogniser is one of configs/embedder/, as in embedder=adaface_ir101; under torchrun the images are shared out, and
the same command goes on where a stopped run ended.
"""

from omegaconf import DictConfig, OmegaConf

from utils.config import entry_point, instantiate, settings
from utils.embedding_job import EncodeSettings, run


@entry_point("encode_config")
def main(cfg: DictConfig) -> None:
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "embedder"])
    options = settings(own, EncodeSettings, "")
    options.check()
    run(options, instantiate(cfg.embedder, "embedder"))


if __name__ == "__main__":
    main()

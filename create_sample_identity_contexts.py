"""Make new identities for sample.py: python create_sample_identity_contexts.py source=... output_dir=...

Settings: configs/create_contexts_config.yaml and configs/source. The same command goes on where a stopped run ended.
"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from diffusion.context_faces import drawn_faces_source
from diffusion.drawn_faces import DrawnFacesSettings
from utils.config import UserError, check_keys, entry_point, existing_file, instantiate, settings
from utils.context_creation import create_contexts
from utils.context_limits import ContextSettings
from utils.context_sources import (
    AuthenticSettings,
    ContextSource,
    InterpolatedSettings,
    UniformSettings,
    authentic_source,
    interpolated_source,
    uniform_source,
)

TWO_STAGE_KEYS = ("sampler", "sampling", "embedder")  # sections that source=two_stage alone reads
CHEAP_SOURCES = {
    "uniform": (UniformSettings, uniform_source),
    "authentic": (AuthenticSettings, authentic_source),
    "interpolated": (InterpolatedSettings, interpolated_source),
}


@entry_point("create_contexts_config")
def main(cfg: DictConfig) -> int:
    """Make and write the contexts; returns how many."""
    shared = {key: cfg[key] for key in cfg if key not in ("source", *TWO_STAGE_KEYS)}
    options = settings(shared, ContextSettings, "")
    return len(create_contexts(options, OmegaConf.to_container(cfg.source), make_source(cfg, options)))


def make_source(cfg: DictConfig, options: ContextSettings) -> ContextSource:
    """The source that the section `source` describes."""
    own = {key: cfg.source[key] for key in cfg.source if key != "name"}
    if cfg.source.name in CHEAP_SOURCES:
        overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        unread = [override for override in overrides if override.lstrip("+~").startswith(TWO_STAGE_KEYS)]
        if unread:
            raise UserError(
                f"{unread[0]}: source={cfg.source.name} draws and embeds nothing; it belongs to source=two_stage"
            )
        cls, build = CHEAP_SOURCES[cfg.source.name]
        return build(settings(own, cls, "source"), options.seed)
    if cfg.source.name != "two_stage":
        raise UserError(
            f"source.name: {cfg.source.name}; leave it as source={'|'.join(CHEAP_SOURCES)}|two_stage sets it"
        )
    drawing = settings(own, DrawnFacesSettings, "source")
    existing_file(drawing.recogniser, "source.recogniser", "recognition.train writes backbone.safetensors")
    sampler, embedder = instantiate(cfg.sampler, "sampler"), instantiate(cfg.embedder, "embedder")
    source = drawn_faces_source(drawing, sampler, embedder, options.seed, Path(options.output_dir))
    check_keys(cfg.sampling, ["sample_config"], "sampling")
    check_keys(cfg.sampling.sample_config, ["cfg_scale"], "sampling.sample_config")
    return source


if __name__ == "__main__":
    main()

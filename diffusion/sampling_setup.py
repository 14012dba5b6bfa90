"""From the keys that sample.py and utils.plotting share to a generator, its people and a checked sampler."""

from omegaconf import DictConfig, OmegaConf

from diffusion.generator import CheckpointChoice, FaceGenerator, load_generator
from diffusion.identities import Identities, load_identities
from diffusion.samplers import Sampler
from diffusion.sampling_settings import SamplingSettings, check_settings
from utils.config import UserError, instantiate, settings


def set_up(cfg: DictConfig, sampling: SamplingSettings) -> tuple[FaceGenerator, Identities, Sampler]:
    """Rebuild the generator on the CPU, read the contexts, build the sampler.

    cfg: with the sections and keys of sample_ddim_config.yaml that `load_generator` and the sampler read; sampling: its
    section `sampling`, read. The sampler's threshold stays `auto` where it has to be measured. Raises UserError for
    settings that are none or do not fit the model.
    """
    check_sample_config(cfg)
    generator = load_generator(
        settings(cfg.checkpoint, CheckpointChoice, "checkpoint"),
        cfg.VQDecoder_path,
        model_cfg_path=cfg.model_cfg_path,
        diffusion_cfg_path=cfg.diffusion_cfg_path,
        latent_diffusion=cfg.latent_diffusion,
        latent_shape=cfg.latent_shape,
    )
    identities = load_identities(generator.unet, sampling.contexts_file, sampling.n_contexts, sampling.seed)
    sampler = check_settings(generator, instantiate(cfg.sampler, "sampler"), sampling)
    return generator, identities, sampler


def check_sample_config(cfg: DictConfig) -> None:
    """Every key of sampling.sample_config must be one that the chosen sampler reads; UserError for another."""
    read = str(OmegaConf.to_container(cfg.sampler, resolve=False))
    for name in cfg.sampling.sample_config:
        if f"sampling.sample_config.{name}}}" not in read:
            raise UserError(
                f"sampling.sample_config.{name}: the chosen sampler ({cfg.sampler._target_}) does not read it"
            )

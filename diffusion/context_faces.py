"""Identity contexts from drawn faces: the recipe behind those of ADMIS (FRCSyn, CVPR 2024) and UIFace (ICLR 2025).

An unconditional model draws faces, a recogniser embeds them (diffusion.drawn_faces). Here is what they are built from.
"""

from collections.abc import Mapping
from pathlib import Path

from diffusion.drawn_faces import DetectionSettings, DrawnFaces, DrawnFacesSettings
from diffusion.generator import load_generator
from diffusion.samplers import Sampler, TwoStage
from diffusion.sampling_settings import check_sampler
from utils.config import UserError, settings
from utils.embedders import Embedder
from utils.precision import check_precision


def drawn_faces_source(
    cfg: DrawnFacesSettings, sampler: Sampler, embedder: Embedder, seed: int, output_dir: Path
) -> DrawnFaces:
    """Load the generator and check everything. Raises UserError, before anything is drawn."""
    for key, value in (("batch_size", cfg.batch_size), ("image_size", cfg.image_size)):
        if value is not None and value < 1:
            raise UserError(f"source.{key}: {value}; give at least 1")
    check_precision(cfg.precision, "source.precision")
    detection = None
    if cfg.align not in (None, False):
        if not isinstance(cfg.align, Mapping):
            raise UserError(f"source.align: {cfg.align!r}; null, or a section as in configs/source/two_stage.yaml")
        detection = settings(cfg.align, DetectionSettings, "source.align")
        detection.check()
    generator = load_generator(
        cfg.checkpoint,
        cfg.VQDecoder_path,
        model_cfg_path=cfg.model_cfg_path,
        diffusion_cfg_path=cfg.diffusion_cfg_path,
        latent_diffusion=cfg.latent_diffusion,
        latent_shape=None if cfg.latent_shape is None else tuple(cfg.latent_shape),
    )
    if generator.unet.is_context_conditional:
        raise UserError(
            f"source.checkpoint.path: {cfg.checkpoint.path} holds a model that takes contexts; faces for new contexts "
            "come from an unconditional one (main.py experiment=unconditional)"
        )
    if isinstance(sampler, TwoStage):
        raise UserError("sampler: the two-stage sampler needs contexts; take sampler=ddim or sampler=ddpm")
    check_sampler(generator, sampler)
    if sampler.guidance_scale != 0:
        raise UserError(
            f"sampling.sample_config.cfg_scale: {sampler.guidance_scale}; an unconditional model has "
            "nothing to be guided by; leave it at 0"
        )
    return DrawnFaces(generator, sampler, embedder, detection, cfg, seed, output_dir)

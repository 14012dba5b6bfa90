"""What stands between images and what is diffused: the frozen autoencoder of latent diffusion, or nothing.

Rombach et al., Latent Diffusion Models (CVPR 2022), section 3.1: latents are diffused
before quantisation, and the decoder quantises. Legend: B batch, C channels, H W and h w height and width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.autoencoder.vqgan import load_decoder, load_encoder
from utils.config import UserError, existing_file
from utils.data.latents import LatentCache


@dataclass
class FirstStage:
    """Images (B, 3, H, W) in [-1, 1] <=> x_0 (B, C, h, w), latents times `latent_scale`; pixel space without networks.

    `latents`, where cached, holds the unscaled latents of every training image and of its mirror image.
    """

    encoder: nn.Module | None = None
    decoder: nn.Module | None = None
    latent_scale: float = 1.0
    latents: LatentCache | None = None

    def encode(self, images: Tensor) -> Tensor:
        """images in [-1, 1] => x_0."""
        return images if self.encoder is None else self.encoder(images) * self.latent_scale

    def decode(self, x_0: Tensor) -> Tensor:
        """x_0 => images in [-1, 1]."""
        images = x_0 if self.decoder is None else self.decoder(x_0 / self.latent_scale)
        return images.clamp(-1, 1)

    def cached(self, rows: list[int], mirrored: list[bool]) -> Tensor:
        """x_0 of these images out of the cache, float32 (B, C, h, w) on the CPU."""
        return torch.from_numpy(self.latents.take(rows, mirrored)) * self.latent_scale


def load_first_stage(
    encoder_path: str | None, decoder_path: str | None, device: torch.device, key: str = "training.checkpoint"
) -> FirstStage:
    """The autoencoder in two files, frozen, on `device`; `latent_scale` is what its training measured (1 if published).

    Raises UserError, naming `key`, for a missing file or two halves that do not belong together.
    """
    hint = "train_autoencoder.py writes both halves; latent_diffusion=false works in pixels"
    encoder = load_encoder(existing_file(encoder_path, f"{key}.VQEncoder", hint)).to(device)
    decoder = load_decoder(existing_file(decoder_path, f"{key}.VQDecoder", hint)).to(device)
    if encoder.latent_scale != decoder.latent_scale:
        raise UserError(
            f"{key}: {encoder_path} scales latents by {encoder.latent_scale:.6g}, {decoder_path} by "
            f"{decoder.latent_scale:.6g}; give the two halves of one autoencoder"
        )
    return FirstStage(encoder, decoder, encoder.latent_scale)

"""The VQ autoencoder in one piece for training (`VQModel`) and cut in two for diffusion (`VQEncoder`, `VQDecoder`).

VQGAN: Esser et al., CVPR 2021. It is the first stage of latent diffusion (Rombach et al., CVPR 2022), in whose latents
IDiff-Face and UIFace diffuse.
Legend: B batch, H W height and width of the image, f = 4 for three levels. Images are RGB in [-1, 1]; latents are
diffused before quantisation, so the encoder does not quantise and the decoder does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.autoencoder.modules import Decoder, Encoder
from models.autoencoder.quantization import VectorQuantizer
from utils.checkpoint import save_safetensors, strict_load
from utils.config import UserError
from utils.networks import AUTOENCODER, DECODER, ENCODER, open_network_file
from utils.networks.autoencoder import DECODER_PARTS, ENCODER_PARTS

# The first stage `ffhq256` of latent diffusion, which the published files hold without saying so.
FFHQ256_DDCONFIG: dict[str, Any] = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
FFHQ256_N_EMBED = 8192
FFHQ256_EMBED_DIM = 3

ENCODER_FILE = "vq_encoder.safetensors"
DECODER_FILE = "vq_decoder.safetensors"


class VQEncoder(nn.Module):
    """Images to latents before quantisation; times `latent_scale` their deviation is 1 (1.0: as they are)."""

    def __init__(self, ddconfig: Mapping[str, Any] = FFHQ256_DDCONFIG, embed_dim: int = FFHQ256_EMBED_DIM) -> None:
        super().__init__()
        self.encoder = Encoder(**ddconfig)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.latent_scale = 1.0

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> latents (B, embed_dim, H/f, W/f), not multiplied by `latent_scale`."""
        return self.quant_conv(self.encoder(images))


class VQDecoder(nn.Module):
    """Latents to images, through the codebook. `latent_scale` is the encoder's."""

    def __init__(
        self,
        ddconfig: Mapping[str, Any] = FFHQ256_DDCONFIG,
        n_embed: int = FFHQ256_N_EMBED,
        embed_dim: int = FFHQ256_EMBED_DIM,
    ) -> None:
        super().__init__()
        self.decoder = Decoder(**ddconfig)
        self.quantize = VectorQuantizer(n_embed, embed_dim)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.latent_scale = 1.0

    def forward(self, latents: Tensor, quantize: bool = True) -> Tensor:
        """latents (B, embed_dim, H/f, W/f) in the encoder's own scale -> images (B, 3, H, W), about [-1, 1]."""
        if quantize:
            latents = self.quantize(latents).latents
        return self.decoder(self.post_quant_conv(latents))


class Reconstruction(NamedTuple):
    """What `VQModel` returns."""

    images: Tensor  # (B, 3, H, W), about [-1, 1]
    latents: Tensor  # (B, embed_dim, H/f, W/f) before quantisation
    indices: Tensor | None  # (B * H/f * W/f,) long, the codes in use; None where nothing is quantised
    quantizer_loss: Tensor  # ()


class VQModel(nn.Module):
    """Both halves with the same parameter names; only training needs them together."""

    def __init__(self, ddconfig: Mapping[str, Any], n_embed: int, embed_dim: int) -> None:
        super().__init__()
        self.ddconfig, self.n_embed, self.embed_dim = dict(ddconfig), n_embed, embed_dim
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.quantize = VectorQuantizer(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> latents (B, embed_dim, H/f, W/f) before quantisation."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, embed_dim, H/f, W/f), as they are -> images (B, 3, H, W)."""
        return self.decoder(self.post_quant_conv(latents))

    @torch.no_grad()
    def shift_latents(self, offset: Tensor) -> None:
        """Add `offset` (embed_dim,) to all latents and codes and take it off before the decoder: the same autoencoder.

        With minus the mean of the latents they are centred, as diffusion starts from noise of mean 0.
        """
        self.quant_conv.bias += offset
        self.quantize.embedding.weight += offset
        self.post_quant_conv.bias -= self.post_quant_conv.weight.flatten(1) @ offset

    def forward(self, images: Tensor, quantize: bool = True) -> Reconstruction:
        """images (B, 3, H, W) in [-1, 1] through encoder, codebook (unless `quantize` is false) and decoder."""
        latents = self.encode(images)  # (B, embed_dim, H/f, W/f)
        if not quantize:
            return Reconstruction(self.decode(latents), latents, None, latents.new_zeros((), dtype=torch.float32))
        quantized = self.quantize(latents)
        return Reconstruction(self.decode(quantized.latents), latents, quantized.indices, quantized.loss)


def save_autoencoder(model: VQModel, output_dir: str | Path, latent_scale: float) -> tuple[Path, Path]:
    """Write both halves of `model` as `vq_encoder.safetensors` and `vq_decoder.safetensors`; returns their paths.

    `latent_scale` is 1 / standard deviation of the latents, which diffusion multiplies them by.
    """
    state = model.state_dict()
    paths = []
    halves = ((ENCODER, ENCODER_FILE, ENCODER_PARTS), (DECODER, DECODER_FILE, DECODER_PARTS))
    for kind, name, parts in halves:
        metadata: dict[str, Any] = {
            "kind": kind,
            "ddconfig": model.ddconfig,
            "embed_dim": model.embed_dim,
            "latent_scale": float(latent_scale),
        }
        if kind == DECODER:
            metadata["n_embed"] = model.n_embed
        tensors = {key: tensor for key, tensor in state.items() if key.startswith(parts)}
        paths.append(save_safetensors(tensors, Path(output_dir) / name, metadata))
    return paths[0], paths[1]


def load_encoder(path: str | Path) -> VQEncoder:
    """The encoder in `path`, in eval mode and without gradients.

    Files written here say what they are. Of any other file the layout is read off the shapes: the published encoder, or
    a whole checkpoint of latent diffusion (`first_stage_model.`). UserError when it does not fit.
    """
    return _load(path, ENCODER, VQEncoder, ("ddconfig", "embed_dim"), ENCODER_PARTS)


def load_decoder(path: str | Path) -> VQDecoder:
    """The decoder in `path`, in eval mode and without gradients; see `load_encoder`."""
    return _load(path, DECODER, VQDecoder, ("ddconfig", "n_embed", "embed_dim"), DECODER_PARTS)


def _load(path: str | Path, kind: str, build: type, arguments: tuple[str, ...], parts: tuple[str, ...]) -> Any:
    """Build the half of `kind` as the file says or shows, and fill it with the keys that begin with `parts`."""
    if not Path(path).is_file():
        hint = f"train_autoencoder.py writes {ENCODER_FILE} and {DECODER_FILE}"
        raise UserError(f"no such autoencoder file: {path}; {hint}")
    file = open_network_file(path)
    if file.kind not in (kind, AUTOENCODER):
        raise file.mismatch(kind)
    try:
        module = build(**{name: file.config[name] for name in arguments if name in file.config})
    except ValueError as error:  # widths that no such autoencoder can have
        raise UserError(f"{path}: looks like {file.looks_like}, but {error}") from error
    state = file.state
    if file.kind == AUTOENCODER:  # leave the other half aside
        other = tuple(part for part in (*ENCODER_PARTS, *DECODER_PARTS) if part not in parts)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(other)}
    strict_load(module, state, str(path), file.looks_like)
    module.latent_scale = float(file.metadata.get("latent_scale", 1.0))
    return module.eval().requires_grad_(False)

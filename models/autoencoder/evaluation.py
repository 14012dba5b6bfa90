"""How well the autoencoder reconstructs: L1, PSNR, SSIM, the energy of fine detail, and a preview.

Legend: B batch, H W height and width, D channels of a latent, n images.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.autoencoder.data import Images
from models.autoencoder.lpips import LPIPS
from models.autoencoder.modules import features_to_rows
from models.autoencoder.vqgan import VQModel
from utils import distributed
from utils.images import grid, to_float, to_uint8

LATENT_IMAGES = 4096  # at most, to measure the deviation of the latents
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
FINE = 0.25  # cycles a pixel: detail of fewer than four pixels


@torch.no_grad()
def evaluate(
    model: VQModel,
    images: Images,
    batch_size: int,
    device: torch.device,
    quantize: bool = True,
    lpips: LPIPS | None = None,
) -> dict[str, float]:
    """Reconstruction of `images`, shared out over the processes; {} where there are none.

    Of the quantised reconstruction, clamped to [-1, 1], means over images: `l1` in that unit, `psnr` in dB, `ssim`,
    `lpips` where that network is given; `detail`: energy of fine detail, reconstructed over original (1 is right, less
    is blurred). `l1_unquantized`: past the codebook, the only one without `quantize`.
    """
    mine = distributed.share(range(len(images)))
    names = ["n", "l1_unquantized"]
    names += ["l1", "psnr", "ssim", "energy", "energy_original"] if quantize else []
    names += ["lpips"] if quantize and lpips is not None else []
    sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
    for start in range(0, len(mine), batch_size):
        real = to_float(images.read(list(mine[start : start + batch_size])).to(device))  # (B, 3, H, W)
        latents = model.encode(real)
        sums["n"] += len(real)
        sums["l1_unquantized"] += (model.decode(latents).clamp(-1, 1) - real).abs().mean(dim=(1, 2, 3)).sum()
        if quantize:
            made = model.decode(model.quantize(latents).latents).clamp(-1, 1)
            sums["l1"] += (made - real).abs().mean(dim=(1, 2, 3)).sum()
            sums["psnr"] += psnr(made, real).sum()
            sums["ssim"] += ssim(made, real).sum()
            sums["energy"] += fine_energy(made).sum()
            sums["energy_original"] += fine_energy(real).sum()
            if lpips is not None:
                sums["lpips"] += lpips(made, real).sum()
    totals = distributed.all_reduce_mean(torch.stack(list(sums.values()))) * distributed.world_size()
    values = dict(zip(sums, totals.tolist(), strict=True))
    n = values.pop("n")
    if not n:
        return {}
    energy, original = values.pop("energy", 0.0), values.pop("energy_original", 0.0)
    means = {name: value / n for name, value in values.items()}
    return {**means, "detail": energy / original} if original else means


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [-1, 1], (B,); 100 at most."""
    return 10 * torch.log10(4 / (images - others).square().mean(dim=(1, 2, 3)).clamp(min=4e-10))  # 4: range 2, squared


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al., IEEE TIP 2004) of images (B, C, H, W) in [-1, 1], (B,); 1 for equal ones.

    As its authors have it: a Gaussian window of 11 pixels and deviation 1.5, no padding, K1 0.01, K2 0.03. Smaller
    images get a window of their own size.
    """
    size = min(SSIM_WINDOW, *images.shape[-2:])
    at = torch.arange(size, device=images.device, dtype=images.dtype) - (size - 1) / 2
    line = torch.exp(-at.square() / (2 * SSIM_SIGMA**2))
    line = line / line.sum()
    channels = images.shape[1]
    window = torch.outer(line, line).expand(channels, 1, size, size)
    stacked = torch.cat([images, others, images * images, others * others, images * others])
    mean_a, mean_b, aa, bb, ab = F.conv2d(stacked, window, groups=channels).chunk(5)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    variances = aa - mean_a.square() + bb - mean_b.square()
    structure = (2 * (ab - mean_a * mean_b) + c2) / (variances + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def fine_energy(images: Tensor) -> Tensor:
    """Energy of what images (B, C, H, W) hold above `FINE` cycles a pixel in either direction, (B,)."""
    spectrum = torch.fft.fft2(images.float())
    height, width = images.shape[-2:]
    rows = torch.fft.fftfreq(height, device=images.device).abs()[:, None]
    columns = torch.fft.fftfreq(width, device=images.device).abs()[None]
    fine = torch.maximum(rows, columns) > FINE  # (H, W)
    return (spectrum.abs().square() * fine).sum(dim=(1, 2, 3)) / (height * width)


@torch.no_grad()
def measure_latents(model: VQModel, images: Images, batch_size: int, device: torch.device) -> tuple[Tensor, float]:
    """Mean (D,) of the latents of training images, per channel, and their standard deviation about it, over all."""
    indices = np.linspace(0, len(images) - 1, min(len(images), LATENT_IMAGES)).astype(int)
    mine = distributed.share(indices.tolist())
    moments = torch.zeros(2, model.embed_dim, dtype=torch.float64, device=device)
    n = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(mine), batch_size):
        real = to_float(images.read(mine[start : start + batch_size]).to(device))
        rows = features_to_rows(model.encode(real)).double()
        moments += torch.stack([rows.sum(dim=0), rows.square().sum(dim=0)])
        n += len(rows)
    mean, square = distributed.all_reduce_mean(moments) / distributed.all_reduce_mean(n)
    return mean.float(), (square - mean.square()).mean().sqrt().item()


@torch.no_grad()
def draw_preview(model: VQModel, pixels: Tensor, device: torch.device, quantize: bool = True) -> np.ndarray:
    """Images uint8 (n, H, W, 3), each beside its reconstruction, four pairs a row: one uint8 picture."""
    reconstructed = to_uint8(model(to_float(pixels.to(device)), quantize).images)
    pairs = np.stack([pixels.numpy(), reconstructed], axis=1).reshape(-1, *pixels.shape[1:])
    return grid(pairs, columns=8)

"""What benchmarks.recognition measures against: the training of a recogniser as TFace does it, written plainly.

Images are decoded by Pillow and go through transforms one at a time, in float32 from ToTensor on; batches are float32
NCHW; the classifier holds all identities; SGD goes over the parameters one by one. Everything is float32.
Legend: B batch, S side in pixels, D width of the embedding, K identities.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.utils.data import Dataset

FILTERS = (Image.NEAREST, Image.BILINEAR, Image.BOX, Image.BICUBIC, Image.LANCZOS)


class PlainDataset(Dataset):
    """Augmented float32 images (3, S, S) in [-1, 1] with their labels, one file at a time."""

    def __init__(self, files: list[Path], labels: list[int], probability: float = 0.2) -> None:
        """`probability` of each of AdaFace's crop, low resolution and photometric."""
        self.files, self.labels, self.probability = files, labels, probability
        self.mean, self.std = torch.full((3,), 0.5), torch.full((3,), 0.5)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        if random.random() < self.probability:
            image = crop(image)
        if random.random() < self.probability:
            image = low_resolution(image)
        if random.random() < self.probability:
            image = photometric(image)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)  # (3, S, S)
        if torch.rand(1) < 0.5:
            tensor = tensor.flip(-1)
        return (tensor - self.mean[:, None, None]) / self.std[:, None, None], self.labels[index]


def crop(image: Image.Image) -> Image.Image:
    """A random box of 0.2 to 1 of the area stays, on black."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.2, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = random.randint(0, height - h), random.randint(0, width - w)
            pixels = np.array(image)
            black = np.zeros_like(pixels)
            black[top : top + h, left : left + w] = pixels[top : top + h, left : left + w]
            return Image.fromarray(black)
    return image


def low_resolution(image: Image.Image) -> Image.Image:
    """Smaller by a random factor, and back."""
    side = int(image.width * random.uniform(0.2, 1.0))
    return image.resize((side, side), random.choice(FILTERS)).resize(image.size, random.choice(FILTERS))


def photometric(image: Image.Image) -> Image.Image:
    """Brightness, contrast and saturation in a random order."""
    for kind in random.sample((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), 3):
        image = kind(image).enhance(random.uniform(0.5, 1.5))
    return image


class PlainArcFace(nn.Module):
    """ArcFace (Deng et al., CVPR 2019, equation 3) over all identities; `weight` (K, D)."""

    def __init__(self, weight: Tensor, scale: float = 64.0, margin: float = 0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.scale, self.margin = scale, margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, D), (B,) => logits (B, K)."""
        cosine = torch.mm(F.normalize(embeddings), F.normalize(self.weight).t()).clamp(-1, 1)
        sine = torch.sqrt((1.0 - cosine**2).clamp_min(1e-12))
        with_margin = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        beyond = cosine - math.sin(math.pi - self.margin) * self.margin
        with_margin = torch.where(cosine > math.cos(math.pi - self.margin), with_margin, beyond)
        own = F.one_hot(labels, cosine.shape[1]).bool()
        return self.scale * torch.where(own, with_margin, cosine)


class PlainTrainer:
    """Backbone, classifier and optimiser of the plain procedure."""

    def __init__(self, backbone: nn.Module, weight: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        self.backbone, self.head = backbone.train(), PlainArcFace(weight)
        norms = [m for m in backbone.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
        spared = [p for m in norms for p in m.parameters()]
        decayed = [p for p in backbone.parameters() if all(p is not s for s in spared)] + [self.head.weight]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared}]
        self.optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, foreach=False)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One step on images (B, 3, S, S); the loss before it."""
        loss = F.cross_entropy(self.head(self.backbone(images), labels), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

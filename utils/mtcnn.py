"""MTCNN face detection (Zhang et al., IEEE Signal Processing Letters 2016) with the weights of facenet-pytorch.

Three small networks in a row: P-Net proposes boxes over an image pyramid, R-Net and O-Net refine and reject them, O-Net
also places five landmarks. Only the weight files of facenet-pytorch are used: its cascade needs torchvision's compiled
operators, fails on a proposal that lies outside the image and cuts its crops one by one. Thresholds, pyramid and pixel
conventions are the same, and so are the faces found.

Legend: B images, H W height and width, N boxes, S side of a crop. Boxes are (x0, y0, x1, y1) in pixels.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

THRESHOLDS = (0.6, 0.7, 0.7)  # least face probability after P-Net, R-Net and O-Net
PYRAMID_FACTOR = 0.709  # about 1/sqrt(2): each level halves the area
PROPOSAL_STRIDE, PROPOSAL_SIZE = 2, 12  # P-Net as a convolution: its window is 12 x 12 and moves by 2
CROPS_AT_ONCE = 512  # bounds the memory of one R-Net or O-Net pass


class Faces(NamedTuple):
    """The faces found in one image, the most probable first."""

    boxes: np.ndarray  # (N, 4) float32
    probabilities: np.ndarray  # (N,) float32
    landmarks: np.ndarray  # (N, 5, 2) float32: left eye, right eye, nose, left and right mouth corner, as seen


class ProposalNet(nn.Module):
    """P-Net: a face probability and a box correction for every window of 12 x 12."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) => probability (B, h, w), correction (B, 4, h, w)."""
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 2, 2, ceil_mode=True)
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_1(x).softmax(dim=1)[:, 1], self.conv4_2(x)


class RefinementNet(nn.Module):
    """R-Net: the same two answers for crops of 24 x 24."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 3, 24, 24) => probability (N,), correction (N, 4)."""
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = self.prelu3(self.conv3(x))
        x = self.prelu4(self.dense4(x.transpose(1, 3).flatten(1)))  # the weights expect (W, H, C) order
        return self.dense5_1(x).softmax(dim=1)[:, 1], self.dense5_2(x)


class OutputNet(nn.Module):
    """O-Net: crops of 48 x 48, with five landmarks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, 3, 48, 48) => probability (N,), correction (N, 4), landmarks (N, 10): five x, five y, 0..1 of the box."""
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu3(self.conv3(x)), 2, 2, ceil_mode=True)
        x = self.prelu4(self.conv4(x))
        x = self.prelu5(self.dense5(x.transpose(1, 3).flatten(1)))
        return self.dense6_1(x).softmax(dim=1)[:, 1], self.dense6_2(x), self.dense6_3(x)


class MTCNN(nn.Module):
    """The cascade, for batches of images of one size.

    `min_face_size` is the side in pixels of the smallest face looked for: the cost grows with its inverse square (1
    takes a hundred times as long as 20 and finds no more faces in photographs of people).
    """

    def __init__(self, min_face_size: float = 20) -> None:
        super().__init__()
        self.min_face_size = min_face_size
        self.pnet, self.rnet, self.onet = ProposalNet(), RefinementNet(), OutputNet()
        for name in ("pnet", "rnet", "onet"):
            weights = torch.load(_weights_folder() / f"{name}.pt", map_location="cpu", weights_only=True)
            getattr(self, name).load_state_dict(weights)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def detect(self, images: torch.Tensor) -> list[Faces]:
        """Find all faces in uint8 images (B, H, W, 3) RGB, on the device of the weights: B results."""
        images = images.to(self.pnet.conv1.weight.device)
        sums = _summed_area(images)  # (B, H+1, W+1, 3)

        owner, boxes = self._propose(images)
        boxes = _square(boxes)
        owner, boxes, crops = _crop(sums, owner, boxes, 24)
        scores, corrections = _run(self.rnet, crops, 2)
        passed = scores > THRESHOLDS[1]
        owner, boxes, scores, corrections = owner[passed], boxes[passed], scores[passed], corrections[passed]
        keep = _suppress(owner, boxes, scores, 0.7)
        owner, boxes = owner[keep], _square(_correct(boxes[keep], corrections[keep]))

        owner, boxes, crops = _crop(sums, owner, boxes, 48)
        scores, corrections, points = _run(self.onet, crops, 3)
        passed = scores > THRESHOLDS[2]
        owner, boxes, scores = owner[passed], boxes[passed], scores[passed]
        # The landmarks were trained with pixels counted from 1.
        origins, sides = boxes[:, None, :2] - 1, (boxes[:, 2:] - boxes[:, :2] + 1)[:, None]
        landmarks = points[passed].reshape(-1, 2, 5).transpose(0, 2, 1) * sides + origins  # (N, 5, 2)
        boxes = _correct(boxes, corrections[passed])
        keep = _suppress(owner, boxes, scores, 0.7, over_smaller=True)
        owner, boxes, scores, landmarks = owner[keep], boxes[keep], scores[keep], landmarks[keep]
        return [
            Faces(boxes[owner == i], scores[owner == i], landmarks[owner == i].astype(np.float32))
            for i in range(len(images))
        ]

    def _propose(self, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """P-Net over the pyramid: the image index (N,) and the corrected box (N, 4) of every candidate."""
        pixels = images.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        height, width = images.shape[1:3]
        scale = PROPOSAL_SIZE / self.min_face_size
        levels = [(np.empty(0, np.int64), np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty((0, 4)))]
        while min(height, width) * scale >= PROPOSAL_SIZE:
            level = F.interpolate(pixels, size=(int(height * scale + 1), int(width * scale + 1)), mode="area")
            probability, correction = self.pnet(_normalise(level))
            owner, row, column = (probability >= THRESHOLDS[0]).nonzero(as_tuple=True)
            corner = torch.stack([column, row], dim=1) * PROPOSAL_STRIDE + 1  # (N, 2)
            boxes = torch.cat([corner, corner + PROPOSAL_SIZE - 1], dim=1).float().div(scale).floor()
            candidates = (owner, boxes, probability[owner, row, column], correction[owner, :, row, column])
            candidates = tuple(part.cpu().numpy() for part in candidates)
            keep = _suppress(*candidates[:3], 0.5)
            levels.append(tuple(part[keep] for part in candidates))
            scale *= PYRAMID_FACTOR
        owner, boxes, scores, corrections = (np.concatenate(parts) for parts in zip(*levels, strict=True))
        keep = _suppress(owner, boxes, scores, 0.7)
        owner, boxes, corrections = owner[keep], boxes[keep], corrections[keep]
        sides = (boxes[:, 2:] - boxes[:, :2])[:, [0, 1, 0, 1]]
        return owner, (boxes + corrections * sides).astype(np.float32)


def _weights_folder() -> Path:
    """Where facenet-pytorch keeps its weights; the package itself is not imported."""
    spec = importlib.util.find_spec("facenet_pytorch")
    if spec is None:
        raise ImportError(
            "face detection needs the weights in the package facenet-pytorch: pip install facenet-pytorch"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _normalise(pixels: torch.Tensor) -> torch.Tensor:
    """0..255 => about [-1, 1], as the networks were trained."""
    return (pixels - 127.5) / 128


def _summed_area(images: torch.Tensor) -> torch.Tensor:
    """Sums over all pixels above and to the left, int32 (B, H+1, W+1, 3); they may wrap, differences stay right."""
    sums = images.to(torch.int32).cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    return F.pad(sums, (0, 0, 1, 0, 1, 0))


def _crop(
    sums: torch.Tensor, owner: np.ndarray, boxes: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Cut boxes out and shrink them to S x S by area averaging, all at once from the summed-area table.

    Boxes are clipped to the image; those that lie outside are dropped. Returns the owners and boxes that stay and their
    crops as network input (N, 3, S, S).
    """
    height, width = sums.shape[1] - 1, sums.shape[2] - 1
    corners = np.trunc(boxes).astype(np.int64)  # pixels are counted from 1 here, both corners belong to the box
    start = np.maximum(corners[:, :2], 1) - 1  # (N, 2): x, y
    size = np.minimum(corners[:, 2:], [width, height]) - start
    inside = (size > 0).all(axis=1)
    owner, boxes = owner[inside], boxes[inside]
    start, size = (torch.from_numpy(part[inside]).to(sums.device)[:, :, None] for part in (start, size))  # (N, 2, 1)
    index = torch.from_numpy(owner).to(sums.device)[:, None, None]
    bins = torch.arange(side, device=sums.device)
    low, high = start + bins * size // side, start - (-(bins + 1) * size // side)  # (N, 2, S): the bins' borders
    crops = []
    for part in range(0, len(boxes), CROPS_AT_ONCE):
        here = slice(part, part + CROPS_AT_ONCE)
        x, y = torch.cat([low[here], high[here]], dim=2).unbind(1)  # (N, 2 S)
        table = sums[index[here], y[:, :, None], x[:, None, :]]  # (N, 2 S, 2 S, 3)
        table = table[:, side:] - table[:, :side]
        total = (table[:, :, side:] - table[:, :, :side]).permute(0, 3, 1, 2)  # (N, 3, S, S)
        extent = (high - low)[here]  # (N, 2, S)
        crops.append(_normalise(total / (extent[:, 1, :, None] * extent[:, 0, None, :])[:, None]))
    return owner, boxes, torch.cat(crops) if crops else torch.empty(0, 3, side, side, device=sums.device)


def _run(network: nn.Module, crops: torch.Tensor, outputs: int) -> list[np.ndarray]:
    """Apply a network to any number of crops; `outputs` arrays."""
    if len(crops) == 0:
        return [np.empty((0, *shape), np.float32) for shape in ((), (4,), (10,))[:outputs]]
    parts = [network(part) for part in crops.split(CROPS_AT_ONCE)]
    return [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]


def _correct(boxes: np.ndarray, corrections: np.ndarray) -> np.ndarray:
    """Move the corners by the predicted shares of the box's sides."""
    sides = (boxes[:, 2:] - boxes[:, :2] + 1)[:, [0, 1, 0, 1]]
    return boxes + corrections * sides


def _square(boxes: np.ndarray) -> np.ndarray:
    """Widen boxes to squares about their centres."""
    sides = boxes[:, 2:] - boxes[:, :2]
    longest = sides.max(axis=1, keepdims=True)
    corner = boxes[:, :2] + sides / 2 - longest / 2
    return np.concatenate([corner, corner + longest], axis=1)


def _suppress(
    owner: np.ndarray, boxes: np.ndarray, scores: np.ndarray, threshold: float, over_smaller: bool = False
) -> np.ndarray:
    """Non-maximum suppression within each image: indices of the boxes that stay, by image, the best first.

    A box falls to a better one that stays when their overlap exceeds `threshold`: intersection over union, or with
    `over_smaller` over the smaller box, pixels counted in.
    """
    kept = [np.empty(0, np.int64)]
    for image in np.unique(owner):
        order = np.flatnonzero(owner == image)
        order = order[np.argsort(-scores[order], kind="stable")]
        low, high = boxes[order, :2], boxes[order, 2:]
        extra = 1 if over_smaller else 0
        area = (high - low + extra).prod(axis=1)
        overlap = np.minimum(high[:, None], high) - np.maximum(low[:, None], low) + extra  # (N, N, 2)
        intersection = overlap.clip(min=0).prod(axis=2)
        base = np.minimum(area[:, None], area) if over_smaller else area[:, None] + area - intersection
        beats = np.triu(intersection > threshold * base, k=1)  # (better, worse)
        # Greedy suppression as a fixed point: a box stays unless one that stays beats it.
        stays = np.ones(len(order), bool)
        while True:
            after = ~beats[stays].any(axis=0)
            if np.array_equal(after, stays):
                break
            stays = after
        kept.append(order[stays])
    return np.concatenate(kept)

"""The classification layer of a recogniser, its class centres spread over the processes and, if wanted, sampled.

With K identities and W processes each process holds K / W consecutive rows of the classifier and their momentum, sees
the embeddings of the global batch, and the softmax is normalised over all processes. Loss and gradients are those of
one process with the whole classifier and the whole batch. Partial FC computes a step with a share of the rows only:
the classes of the batch and random negatives (An et al., "Partial FC: Training 10 Million Identities on a Single
Machine", 2021, arXiv 2010.05222; "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition
CNNs by Partial FC", CVPR 2022, arXiv 2203.15565).

Legend: B images of the global batch, b those of this process, D width of the embedding, K identities, R rows that this
process computes with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recognition.heads import CosineHead, embedding_norms
from utils import distributed
from utils.config import UserError
from utils.distributed import seed_for

PIECE = 65_536  # rows that travel at once when the shards are merged: 128 MB of 512 float32


@dataclass
class Classified:
    """What the classifier says of the global batch; the same on every process."""

    loss: Tensor  # (): mean cross-entropy, with gradient
    hits: Tensor  # (B,) bool: the own class is nearer than all others in use, without margin
    cosines: Tensor  # (B,) to the own class, without gradient
    norms: Tensor  # (B,) of the embeddings, without gradient
    embeddings: Tensor  # (B, D), without gradient


class PartialFC(nn.Module):
    """Margin softmax over class centres that are sharded over processes and, below rate 1, sampled in every step.

    A step is `begin_step`, one `forward` and backward for each part of the batch, the optimiser's step, `end_step`.
    `head.weight` is the parameter that the optimiser knows: all rows of this process, or below rate 1 those of the
    step, with their momentum; the other rows keep weights and momentum as they are.
    """

    def __init__(self, head: CosineHead, sample_rate: float = 1.0, seed: int = 0) -> None:
        """Takes this process's rows out of the whole `head.weight` (K, D), which is the same on every process.

        Args:
            sample_rate: share of each process's rows that a step computes with, above 0 and at most 1.

        Raises:
            UserError: fewer identities than processes. ValueError: a rate outside of its range.
        """
        super().__init__()
        self.num_classes = len(head.weight)
        if self.num_classes < distributed.world_size():
            raise UserError(
                f"dataset: {self.num_classes} identities on {distributed.world_size()} processes; every process needs "
                "one, start fewer"
            )
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate: {sample_rate}; above 0 and at most 1 is wanted")
        self.rows = shard(self.num_classes, distributed.rank(), distributed.world_size())
        self.head = head
        head.weight = nn.Parameter(head.weight.detach()[self.rows.start : self.rows.stop].clone())
        self.sample_rate, self.seed = sample_rate, seed
        # Below rate 1, from the first step on: all rows of this process, their momenta, and which of them are in use
        self.register_buffer("centres", None, persistent=False)  # (rows, D)
        self.momenta: dict[str, Tensor] = {}  # name in the optimiser's state -> (rows, D)
        self.index: Tensor | None = None  # (R,) long, rising

    def forward(
        self, embeddings: Tensor, labels: Tensor, generator: torch.Generator | None = None, *, observe: bool = True
    ) -> Classified:
        """Embeddings (b, D) and labels (b,) long of this process => the global batch's loss.

        The gradient that reaches `embeddings` is that of the global mean: over processes, gradients of the weights
        before them add up. `generator`: see CosineHead.target_logit. `observe`: update the head's statistics first.
        """
        embeddings, labels = _AllGather.apply(embeddings.float()), all_gather(labels)  # (B, D), (B,)
        cosines = self.head.cosine(embeddings)  # (B, R)
        norms = embedding_norms(embeddings)  # (B,)
        columns = self._columns(labels)  # (B,): -1 where another process has the class
        mine, places = columns >= 0, columns.clamp_min(0)[:, None]  # (B,), (B, 1)

        # Cosines to the own class, which one process has: everybody knows the values, that one has the gradient
        local = cosines.gather(1, places).squeeze(1)  # (B,)
        own = torch.where(mine, local, _all_reduce(torch.where(mine, local, 0.0).detach()))  # (B,)
        # Classes as near as the own one, itself included: the cosines of a collapsed network are equal and hit nothing
        as_near = _all_reduce((cosines.detach() >= own.detach()[:, None]).sum(dim=1))  # (B,)
        if observe:
            self.head.observe(own.detach(), norms)
        target = self.head.target_logit(own, norms, generator)  # (B,)
        others = self.head.other_logits(cosines, target)  # (B, R)
        # At the own class the target; where that is elsewhere, column 0 stays what it is
        logits = others.scatter(1, places, torch.where(mine[:, None], target[:, None], others.gather(1, places)))
        loss = _CrossEntropy.apply(self.head.scale * logits, columns)
        return Classified(loss, as_near == 1, own.detach(), norms, embeddings.detach())

    def _columns(self, labels: Tensor) -> Tensor:
        """The columns (B,) of this process's logits that belong to `labels` (B,); -1 for classes that are elsewhere."""
        places = labels - self.rows.start
        mine = (places >= 0) & (places < len(self.rows))
        if self.index is not None:
            places = torch.searchsorted(self.index, places)
        return torch.where(mine, places, -1)

    @torch.no_grad()
    def begin_step(self, labels: Tensor, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Below rate 1: choose the rows of 0-based `step` for the batch with `labels` (b,) on this process, and give
        them and their momentum to `optimizer` in place of those of the step before."""
        if self.sample_rate == 1:
            return
        weight = self.head.weight
        if self.centres is None:
            self.centres = weight.detach()
            self.momenta = row_tensors(optimizer, weight)
        labels = all_gather(labels)
        mine = labels[(labels >= self.rows.start) & (labels < self.rows.stop)]
        generator = torch.Generator().manual_seed(seed_for(self.seed, "partial_fc", step, distributed.rank()))
        positives = (mine - self.rows.start).unique().cpu()
        self.index = sample_rows(positives, len(self.rows), self.sample_rate, generator).to(weight.device)

        # A new parameter, not new values in the old one: their number changes where many positives meet in a shard
        self.head.weight = nn.Parameter(self.centres[self.index])
        for group in optimizer.param_groups:
            group["params"] = [self.head.weight if p is weight else p for p in group["params"]]
        state = optimizer.state.pop(weight, {})
        if state:
            rows = {name: values[self.index] for name, values in self.momenta.items()}
            optimizer.state[self.head.weight] = {**state, **rows}

    @torch.no_grad()
    def end_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Below rate 1: take what the optimiser's step made of the sampled rows and of their momentum."""
        if self.index is None:
            return
        self.centres[self.index] = self.head.weight
        for name, rows in row_tensors(optimizer, self.head.weight).items():
            if name not in self.momenta:
                self.momenta[name] = torch.zeros_like(self.centres)
            self.momenta[name][self.index] = rows

    def gradient_norm(self) -> Tensor:
        """The norm () of the gradient of the whole classifier, the same on every process."""
        return _all_reduce(self.head.weight.grad.square().sum()).sqrt()

    def whole_weight(self) -> Tensor | None:
        """The whole classifier (K, D) on the CPU of rank 0, None elsewhere; all processes call it together."""
        return self._merged(self.head.weight.detach() if self.centres is None else self.centres)

    def whole_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimiser's state of the whole classifier, as it would be on one process: see `whole_weight`."""
        state = dict(optimizer.state.get(self.head.weight, {}))
        rows = row_tensors(optimizer, self.head.weight) if self.centres is None else self.momenta
        return {**state, **{name: self._merged(values) for name, values in rows.items()}}

    def part(self, whole: Tensor) -> Tensor:
        """This process's rows of a tensor (K, D), or `whole` itself where it has no axis of classes."""
        if not whole.dim():
            return whole
        return whole[self.rows.start : self.rows.stop].clone()  # a view would keep the whole in memory

    def _merged(self, rows: Tensor) -> Tensor | None:
        """Rows of every process => (K, D) on the CPU of rank 0, a piece at a time, so that no GPU holds them all."""
        if distributed.world_size() == 1:
            return rows.cpu()
        whole = torch.empty(self.num_classes, *rows.shape[1:], dtype=rows.dtype) if distributed.is_main() else None
        for rank in range(distributed.world_size()):
            part = shard(self.num_classes, rank, distributed.world_size())
            for start in range(part.start, part.stop, PIECE):
                stop = min(start + PIECE, part.stop)
                if rank == distributed.rank():
                    piece = rows[start - part.start : stop - part.start].contiguous()
                    if rank != 0:
                        dist.send(piece, dst=0)
                elif distributed.is_main():
                    piece = torch.empty(stop - start, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
                    dist.recv(piece, src=rank)
                if distributed.is_main():
                    whole[start:stop] = piece
        return whole


def shard(num_classes: int, rank: int, world_size: int) -> range:
    """The consecutive rows of process `rank`; numbers of rows differ by at most one over processes."""
    return range(num_classes * rank // world_size, num_classes * (rank + 1) // world_size)


def sample_rows(positives: Tensor, num_rows: int, rate: float, generator: torch.Generator) -> Tensor:
    """Numbers (R,) of the rows to compute with, rising: all `positives` (P,) and random others, R = max(P, rate rows).

    Section 3.2 of arXiv 2203.15565: the positives' centres always take part, negatives are drawn without replacement.
    """
    scores = torch.rand(num_rows, generator=generator)
    scores[positives] = 2.0  # above every draw
    count = max(len(positives), round(rate * num_rows), 1)
    return scores.topk(count).indices.sort().values


def row_tensors(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """What `optimizer` keeps for every number in `weight` (R, D): momenta, not its counter of steps."""
    state = optimizer.state.get(weight, {})
    return {name: t for name, t in state.items() if isinstance(t, Tensor) and t.shape == weight.shape}


def all_gather(tensor: Tensor) -> Tensor:
    """Every process's `tensor` (b, ...), of one shape, in the order of ranks: (B, ...); no gradient."""
    if distributed.world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(distributed.world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _all_reduce(tensor: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    if distributed.world_size() > 1:
        dist.all_reduce(tensor, op)
    return tensor


class _AllGather(torch.autograd.Function):
    """`all_gather` whose gradient is the sum over processes of what each of them computed for this one's rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.size = len(local)
        return all_gather(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        start = distributed.rank() * ctx.size
        return _all_reduce(gradient.contiguous().clone())[start : start + ctx.size]


class _CrossEntropy(torch.autograd.Function):
    """Mean softmax cross-entropy of logits (B, R) whose other columns are on other processes.

    `columns` (B,): of the own class, -1 where another process has it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor) -> Tensor:
        mine, places = columns >= 0, columns.clamp_min(0)[:, None]
        top = _all_reduce(logits.amax(dim=1), dist.ReduceOp.MAX)  # (B,)
        probabilities = (logits - top[:, None]).exp_()  # (B, R), not yet normalised
        own = torch.where(mine, logits.gather(1, places).squeeze(1), 0.0)
        total, own = _all_reduce(torch.stack([probabilities.sum(dim=1), own]))  # (B,), (B,)
        ctx.save_for_backward(probabilities.div_(total[:, None]), mine, places)
        return (total.log() + top - own).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        probabilities, mine, places = ctx.saved_tensors
        share = gradient / len(probabilities)
        own = torch.where(mine, -share, torch.zeros_like(share))
        return (probabilities * share).scatter_add_(1, places, own[:, None]), None

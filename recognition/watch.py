"""What watches over a recogniser while it trains: numbers that go wrong, each told once with what it most likely means.

Legend: B batch of all processes, D width of the embedding, K identities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recognition.heads import CosineHead
from recognition.training_settings import TrainingSettings
from utils import distributed
from utils.logging import get_logger

log = get_logger(__name__)

COLLAPSED = 0.95  # mean cosine between the embeddings of a batch, of different people for the most part
FLAT = 0.05  # deviation of the embeddings from their mean, over their own length
NORM_FACTOR = 100.0  # norms that grew or shrank by it since the first look; measured ones stay within 10
MIN_SEEN = 200  # images whose hits tell anything about the accuracy
STUCK_LOSS = 0.95  # share of the loss at chance above which a loss has not moved
LEAK = 0.99  # accuracy in the second half of the first epoch
LEAK_IDENTITIES = 20  # fewer can be told apart so soon
USUAL_NORM = 20.0  # of embeddings, for heads whose margin depends on it


def chance_loss(num_identities: int, scale: float = 1.0, target_at_zero: float = 0.0) -> float:
    """Cross-entropy of a margin head whose cosines are all 0: log(1 + (K - 1) exp(-s t)), nats.

    scale: s of the head. target_at_zero: t, its target for the cosine 0, which is -sin m for ArcFace (Deng et al., CVPR
    2019, equation 3), -m for CosFace (Wang et al., CVPR 2018, equation 4). log K without a margin.
    """
    margin_and_others = math.log(num_identities - 1) - scale * target_at_zero
    return max(margin_and_others, 0.0) + math.log1p(math.exp(-abs(margin_and_others)))


@dataclass
class Hits:
    """Images seen and classified rightly, before the margin."""

    seen: float = 0.0
    right: float = 0.0

    @property
    def accuracy(self) -> float:
        """Share of the images; NaN before there are any."""
        return self.right / self.seen if self.seen else math.nan

    def add(self, seen: float, right: float) -> None:
        """Count `seen` more images, `right` of them right."""
        self.seen += seen
        self.right += right


class Watch:
    """Called with the numbers of the global batch every so often. Ranks hold the same ones; rank 0 speaks."""

    def __init__(
        self, num_identities: int, *, steps_per_epoch: int, loss_at_chance: float | None = None, patience: int = 2
    ) -> None:
        """num_identities: K, those that a step compares (with Partial FC its share). loss_at_chance: see `chance_loss`;
        None: log K. patience: epochs after which a run should have left chance.

        Raises ValueError for fewer than two identities, or no steps.
        """
        if num_identities < 2 or steps_per_epoch < 1 or patience < 1:
            raise ValueError(f"{num_identities} identities, {steps_per_epoch} steps an epoch, patience {patience}")
        self.num_identities, self.steps_per_epoch, self.patience = num_identities, steps_per_epoch, patience
        self.loss_at_chance = math.log(num_identities) if loss_at_chance is None else loss_at_chance
        self._told: set[str] = set()
        self._first_norm: float | None = None
        self._recent = Hits()  # since the accuracy was last compared with chance
        self._early = Hits()  # in the second half of the first epoch
        self._left_chance = False

    @torch.no_grad()
    def look(
        self, step: int, *, loss: Tensor, hits: Tensor, norms: Tensor, cosines: Tensor, embeddings: Tensor
    ) -> dict[str, float]:
        """Judge step `step` (from 1 on); every warning is logged once, on rank 0.

        Args, all of the global batch:
            loss: scalar, the step's loss.
            hits: (any,) bool, whether the nearest class was the right one, of this step or of all since the last look.
            norms: (B,) lengths of the embeddings before they are normalised.
            cosines: (B,) cosine of each embedding to its own class, before the margin.
            embeddings: (B, D), any length.

        Returns:
            For the log: norm_mean, norm_std; angle_mean, angle_std (to the own class, degrees); batch_cosine (mean
            cosine of two embeddings); spread (deviation of the embeddings from their mean, over their length).
        """
        numbers = measure(loss, hits, norms, cosines, embeddings)
        seen, right, loss_now = hits.numel(), numbers.pop("right"), numbers.pop("loss")
        epoch = (step - 1) // self.steps_per_epoch
        self._recent.add(seen, right)
        if epoch == 0 and 2 * step > self.steps_per_epoch:
            self._early.add(seen, right)

        self._judge_finite(step, loss_now, numbers["norm_mean"])
        if math.isfinite(numbers["norm_mean"]):
            self._judge_norms(step, numbers["norm_mean"])
            self._judge_collapse(step, numbers)
        if step >= self.patience * self.steps_per_epoch:
            self._judge_chance(step, loss_now)
        if step % self.steps_per_epoch == 0 or epoch > 0:
            self._judge_leak(step)
        return numbers

    def _tell(self, key: str, message: str, *arguments: object) -> None:
        if key not in self._told:
            self._told.add(key)
            if distributed.is_main():
                log.warning(message, *arguments)

    def _judge_finite(self, step: int, loss: float, norm: float) -> None:
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._tell(
                "finite",
                "step %d: the loss is %g, the mean norm of the embeddings %g; most likely the run diverged: "
                "training.optimizer.lr is too high for the start (training.lr_schedule.warmup_epochs, "
                "training.gradient_clip=5), or fp16 overflowed (training.precision=bf16)",
                *(step, loss, norm),
            )

    def _judge_norms(self, step: int, norm: float) -> None:
        if self._first_norm is None:
            self._first_norm = norm
        if norm > NORM_FACTOR * max(self._first_norm, 1e-6):
            self._tell(
                "exploding",
                "step %d: the embeddings' mean norm is %.3g, %.3g at first; most likely the backbone's last layers "
                "explode: lower training.optimizer.lr, or clip the gradient (training.gradient_clip=5)",
                *(step, norm, self._first_norm),
            )
        elif norm < self._first_norm / NORM_FACTOR or norm == 0:
            self._tell(
                "vanishing",
                "step %d: the embeddings' mean norm is %.3g, %.3g at first; most likely weight decay outweighs the "
                "gradient or units died: lower training.optimizer.weight_decay or training.optimizer.lr",
                *(step, norm, self._first_norm),
            )

    def _judge_collapse(self, step: int, numbers: dict[str, float]) -> None:
        if numbers["batch_cosine"] > COLLAPSED or numbers["spread"] < FLAT:
            self._tell(
                "collapsed",
                "step %d: the embeddings of a batch are all alike (mean cosine %.3f, spread %.3f of their length); "
                "most likely the network collapsed (training.optimizer.lr too high at the start, labels that mean "
                "nothing) or the images are all the same",
                *(step, numbers["batch_cosine"], numbers["spread"]),
            )

    def _judge_chance(self, step: int, loss: float) -> None:
        """Whether the accuracy is still what guessing gives, three deviations of a binomial allowed."""
        if self._left_chance or self._recent.seen < MIN_SEEN:
            return
        chance, accuracy, seen = 1 / self.num_identities, self._recent.accuracy, self._recent.seen
        self._recent = Hits()
        if accuracy > chance + 3 * math.sqrt(chance * (1 - chance) / seen):
            self._left_chance = True
        elif not loss < STUCK_LOSS * self.loss_at_chance:
            self._tell(
                "chance",
                "step %d: after %d epochs %.2g of %d images are classified rightly, where guessing gives %.2g, and the "
                "loss is %.4g, where guessing gives %.4g; most likely the labels are shuffled (recognition.check with "
                "an embedder tells), training.optimizer.lr is wrong, or the margin is too large for the start",
                *(step, step // self.steps_per_epoch, accuracy, int(seen), chance, loss, self.loss_at_chance),
            )

    def _judge_leak(self, step: int) -> None:
        """Whether the first epoch alone taught everything. Nothing where the run was resumed after it."""
        if self._early.seen >= MIN_SEEN and self._early.accuracy >= LEAK and self.num_identities >= LEAK_IDENTITIES:
            self._tell(
                "leak",
                "step %d: %.2f %% of the images were classified rightly in the first epoch already; most likely the "
                "labels can be read off the images otherwise than by the face (copies of one image, one background or "
                "border an identity): look at images of some identities",
                *(step, 100 * self._early.accuracy),
            )


def watch_over(head: CosineHead, num_images: int, cfg: TrainingSettings) -> Watch:
    """The watch of a run of recognition.train with the whole classifier `head` on so many images."""
    in_use = max(2, round(cfg.sample_rate * len(head.weight)))
    was_training = head.training
    head.eval()  # random margins are their means
    target = head.target_logit(torch.zeros(1), torch.full((1,), USUAL_NORM), None)
    head.train(was_training)
    return Watch(
        in_use,
        steps_per_epoch=cfg.steps_of_epoch(num_images),
        loss_at_chance=chance_loss(in_use, head.scale, target.item()),
    )


def measure(loss: Tensor, hits: Tensor, norms: Tensor, cosines: Tensor, embeddings: Tensor) -> dict[str, float]:
    """The numbers that `Watch.look` returns, with `loss` and `right` (hits), in one transfer from the device."""
    norms, embeddings = norms.float(), embeddings.float()
    angles = cosines.float().clamp(-1, 1).acos().rad2deg()  # (B,)
    batch = len(embeddings)
    total = F.normalize(embeddings).sum(dim=0)  # (D,)
    length = embeddings.square().sum(dim=1).mean().sqrt()
    deviation = (embeddings - embeddings.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    values = {
        "loss": loss,
        "right": hits.sum(),
        "norm_mean": norms.mean(),
        "norm_std": norms.std(correction=0),
        "angle_mean": angles.mean(),
        "angle_std": angles.std(correction=0),
        # |sum u|^2 counts every pair twice and every embedding with itself once
        "batch_cosine": (total.square().sum() - batch) / max(1, batch * (batch - 1)),
        "spread": deviation / length.clamp_min(torch.finfo(length.dtype).tiny),
    }
    numbers = torch.stack([value.to(norms.device, torch.float32) for value in values.values()])
    return dict(zip(values, numbers.tolist(), strict=True))

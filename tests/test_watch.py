"""What is told while a recogniser trains: each guard fires once on its cause, and none on a run that goes well."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from recognition import watch
from recognition.heads import ArcFace, CosFace, ElasticFaceCos
from recognition.training_settings import TrainingSettings
from recognition.watch import Watch, chance_loss, watch_over

K, WIDTH = 30, 16


def numbers(seed=0, batch=64, *, loss=3.0, accuracy=0.5, norm=20.0, alike=0.0):
    """What a step would hand over."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = F.normalize(torch.randn(batch, WIDTH, generator=generator))
    embeddings = norm * F.normalize((1 - alike) * embeddings + alike * torch.ones(WIDTH))
    return {
        "loss": torch.tensor(loss),
        "hits": torch.arange(batch) < accuracy * batch,
        "norms": embeddings.norm(dim=1),
        "cosines": torch.full((batch,), 0.5),
        "embeddings": embeddings,
    }


def watched(caplog, steps, watch=None):
    """The warnings of a run that hands over `steps`, dictionaries of `numbers`, one step after another."""
    watch = watch or Watch(K, steps_per_epoch=10)
    for step, values in enumerate(steps, start=1):
        watch.look(step, **{"seed": step, **values} if "seed" in values else numbers(step, **values))
    return [record.getMessage() for record in caplog.records]


def test_numbers_by_hand():
    embeddings = torch.tensor([[3.0, 0.0], [0.0, 4.0], [3.0, 4.0]])
    scalars = Watch(K, steps_per_epoch=10).look(
        1,
        loss=torch.tensor(1.0),
        hits=torch.tensor([True, False, True]),
        norms=embeddings.norm(dim=1),
        cosines=torch.tensor([0.5, 0.0, 1.0]),
        embeddings=embeddings,
    )
    angles = np.array([60.0, 90.0, 0.0])
    assert scalars == pytest.approx(
        {
            "norm_mean": 4.0,
            "norm_std": math.sqrt(2 / 3),
            "angle_mean": 50.0,
            "angle_std": angles.std(),
            "batch_cosine": (0 + 0.6 + 0.8) / 3,
            "spread": math.sqrt((2 + 32 / 9) / (50 / 3)),
        },
        abs=1e-4,
    )


def test_loss_at_chance():
    for head, target in ((ArcFace(K + 1, K, 16.0, 0.5), -math.sin(0.5)), (CosFace(K + 1, K, 16.0, 0.4), -0.4)):
        axes = torch.eye(K + 1)
        head.weight.data = axes[:K]  # the embedding is orthogonal to every class
        expected = F.cross_entropy(head(axes[K:], torch.tensor([3])), torch.tensor([3])).item()
        assert chance_loss(K, 16.0, target) == pytest.approx(expected, rel=1e-5)
    assert chance_loss(K) == pytest.approx(math.log(K))
    assert chance_loss(1_000_000, 64.0, -math.sin(0.5)) == pytest.approx(math.log(1e6) + 64 * math.sin(0.5), rel=1e-6)
    with pytest.raises(ValueError):
        Watch(1, steps_per_epoch=10)


def test_the_watch_of_a_run():
    head = ElasticFaceCos(WIDTH, K, 16.0, 0.3)
    watch = watch_over(head, 640, TrainingSettings(batch_size=64, sample_rate=0.5))
    assert (watch.num_identities, watch.steps_per_epoch, head.training) == (15, 10, True)
    assert watch.loss_at_chance == pytest.approx(math.log(1 + 14 * math.exp(16 * 0.3)))


def test_a_run_that_goes_well_is_silent(caplog):
    steps = [{"loss": 4 - 0.1 * k, "accuracy": min(0.9, k / 20), "norm": 20 - 0.3 * k} for k in range(30)]
    assert watched(caplog, steps) == []


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{}] + [{"loss": math.nan}] * 3, "step 2: the loss is nan, .* the run diverged"),
        ([{}] + [{"norm": math.inf}] * 3, "step 2: the loss is 3, the mean norm of the embeddings inf; .* diverged"),
        ([{"norm": 20.0}] + [{"norm": 3000.0}] * 3, r"step 2: .* norm is 3e\+03, 20 at first; .* explode"),
        ([{"norm": 20.0}] + [{"norm": 0.1}] * 3, "step 2: .* norm is 0.1, 20 at first; .* weight decay"),
        ([{}] + [{"alike": 0.95}] * 3, r"step 2: .* all alike \(mean cosine 1.000, spread 0.0.* collapsed"),
        ([{"accuracy": 0.03, "loss": 3.4}] * 40, "step 20: after 2 epochs 0.031 of 1280 .*guessing gives 0.033, and"),
        ([{"accuracy": 1.0}] * 12, "step 10: 100.00 % .* in the first epoch already; most likely the labels can be"),
    ],
    ids=["nan", "infinite", "exploding", "vanishing", "collapsed", "chance", "leak"],
)
def test_each_guard_tells_once(caplog, steps, words):
    (message,) = watched(caplog, steps)
    assert re.search(words, message), message


def test_what_is_advised_are_keys_of_the_configuration(compose):
    named = set(re.findall(r"training\.[a-z_.]*[a-z_]", Path(watch.__file__).read_text().partition("class Watch")[2]))
    cfg = compose("recognition_train_config", "dataset.root=x", "output_dir=x")
    assert {"training.optimizer.lr", "training.gradient_clip"} <= named
    for key in named:
        section, _, name = key.rpartition(".")
        assert name in OmegaConf.select(cfg, section), key


def test_what_is_not_told(caplog):
    slow = [{"accuracy": 0.03, "loss": 2.5}] * 40  # guesses badly, but the loss falls
    started = [{"accuracy": 0.5}] * 20 + [{"accuracy": 0.0, "loss": 4.0}] * 20  # a rate that jumps is told by the loss
    later = [{"accuracy": 0.1}] * 10 + [{"accuracy": 1.0}] * 20
    for steps in (slow, started, later):
        assert watched(caplog, steps) == []
    assert watched(caplog, [{"accuracy": 1.0}] * 12, Watch(2, steps_per_epoch=10)) == []
    few = [{"accuracy": 0.0, "loss": 4.0, "batch": 4}] * 25  # 100 images tell nothing
    assert watched(caplog, few) == []
    # A large margin: what guessing costs is known
    margin = Watch(K, steps_per_epoch=10, loss_at_chance=chance_loss(K, 64.0, -math.sin(0.5)))
    assert watched(caplog, [{"accuracy": 0.03, "loss": 20.0}] * 30, margin) == []


def tiny_run(lr, *, labels="patterns", steps=80, network=None, seed=0):
    """Train a few layers on patterns with noise, a colour pattern an identity, and watch."""
    torch.manual_seed(seed)
    patterns = torch.randn(K, 3 * 8 * 8)
    network = network or nn.Sequential(nn.Linear(3 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, WIDTH))
    head = CosFace(WIDTH, K, scale=16.0, margin=0.2)
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=lr, momentum=0.9)
    watch = Watch(K, steps_per_epoch=20, loss_at_chance=chance_loss(K, 16.0, -0.2))
    for step in range(1, steps + 1):
        own = torch.randint(K, (64,))
        images = patterns[own] + 1.5 * torch.randn(64, patterns.shape[1])
        target = own if labels == "patterns" else torch.randint(K, (64,))
        embeddings = network(images)
        cosine = head.cosine(embeddings)
        loss = F.cross_entropy(head(embeddings, target), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scalars = watch.look(
            step,
            loss=loss.detach(),
            hits=cosine.detach().argmax(dim=1) == target,
            norms=embeddings.detach().norm(dim=1),
            cosines=cosine.detach().gather(1, target[:, None])[:, 0],
            embeddings=embeddings.detach(),
        )
    return scalars


def test_real_training(caplog):
    first = tiny_run(0.05, steps=1)
    last = tiny_run(0.05)
    assert not caplog.records
    assert last["angle_mean"] < first["angle_mean"] - 20


def test_real_training_with_shuffled_labels(caplog):
    tiny_run(0.05, labels="shuffled")
    # With nothing to learn the embeddings shrink to one, which is told as well
    collapsed, stuck = [record.getMessage() for record in caplog.records]
    assert "embeddings of a batch are all alike" in collapsed
    assert stuck.startswith("step 40: after 2 epochs 0.0")


def test_real_training_that_becomes_nan(caplog):
    class Overflows(nn.Sequential):
        """The tenth batch's embeddings pass what float32 can hold."""

        calls = 0

        def forward(self, images):
            self.calls += 1
            return super().forward(images) * (1e30 if self.calls >= 10 else 1.0) ** 2

    tiny_run(0.05, network=Overflows(nn.Linear(3 * 8 * 8, WIDTH)), steps=20)
    assert [record.getMessage()[:8] for record in caplog.records] == ["step 10:"]
    assert "most likely the run diverged" in caplog.text


def test_real_training_of_a_dead_network(caplog):
    network = nn.Sequential(nn.Linear(3 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, WIDTH))
    nn.init.constant_(network[0].bias, -1e4)  # no unit of the first layer ever fires: one embedding for everybody
    tiny_run(0.05, network=network)
    (collapsed, stuck) = [record.getMessage() for record in caplog.records]
    assert "embeddings of a batch are all alike (mean cosine 1.000, spread 0.000" in collapsed
    assert "step 40: after 2 epochs" in stuck

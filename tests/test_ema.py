"""The average of weights against sums done by hand."""

import pytest
import torch
from torch import nn

from utils.ema import EMA


class Scalar(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))
        self.register_buffer("count", torch.tensor([0.0]))


def test_plain_decay_matches_hand_sums():
    model = Scalar(1.0)
    ema = EMA(model, decay=0.9, power=None)
    expected = 1.0
    for value in (2.0, 4.0, -3.0):
        model.weight.data.fill_(value)
        model.count.fill_(value)
        ema.update(model)
        expected = 0.9 * expected + 0.1 * value
    assert ema.model.weight.item() == pytest.approx(expected, abs=1e-6)
    assert ema.model.weight.item() == pytest.approx(0.9**3 + 0.1 * (0.81 * 2 + 0.9 * 4 - 3), abs=1e-6)
    assert ema.model.count.item() == -3.0  # buffers are copied
    assert model.weight.item() == -3.0  # the model itself is left alone


def test_warm_up_starts_at_zero_and_rises():
    ema = EMA(Scalar(0.0))
    decays = [ema.decay_at(n) for n in (1, 2, 3, 4, 100, 10**7)]
    assert decays[:2] == [0.0, 0.0]
    assert decays[2] == pytest.approx(1 - 2**-0.75)
    assert decays[3] == pytest.approx(1 - 3**-0.75)
    assert decays[4] == pytest.approx(1 - 99**-0.75)
    assert decays[5] == 0.9999


def test_first_updates_take_over_the_weights():
    model = Scalar(5.0)
    ema = EMA(model)
    model.weight.data.fill_(7.0)
    ema.update(model)
    assert ema.model.weight.item() == 7.0
    model.weight.data.fill_(9.0)
    ema.update(model)
    model.weight.data.fill_(1.0)
    ema.update(model)
    decay = 1 - 2**-0.75
    assert ema.model.weight.item() == pytest.approx(decay * 9.0 + (1 - decay) * 1.0, abs=1e-6)


def test_state_round_trip_and_bad_settings():
    model = Scalar(1.0)
    ema = EMA(model, decay=0.5, power=None)
    model.weight.data.fill_(3.0)
    ema.update(model)
    other = EMA(Scalar(0.0), decay=0.5, power=None)
    other.load_state_dict(ema.state_dict())
    assert other.num_updates == 1 and other.model.weight.item() == 2.0
    with pytest.raises(ValueError, match=r"1\.5"):
        EMA(model, decay=1.5)
    with pytest.raises(ValueError, match="other parameters"):
        ema.update(nn.Linear(1, 1))

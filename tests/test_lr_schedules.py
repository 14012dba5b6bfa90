"""Learning rates of the recogniser's training, pinned."""

import pytest

from recognition.lr_schedules import Cosine, LRSchedule, Plateau, Polynomial, Step
from utils.config import UserError


def rates(schedule: LRSchedule, steps: tuple[int, ...], steps_per_epoch: int = 10, epochs: int = 40) -> list[float]:
    return [round(schedule.at(step, steps_per_epoch, epochs), 8) for step in steps]


def test_step() -> None:
    steps = tuple(10 * epoch for epoch in (0, 21, 22, 27, 28, 32, 39))
    assert rates(Step(milestones=[22, 28, 32]), (*steps, 219)) == [1, 1, 0.1, 0.1, 0.01, 1e-3, 1e-3, 1]
    assert rates(Step(milestones=[1], factor=0.5), (9, 10), epochs=2) == [1, 0.5]
    assert rates(Step(warmup_epochs=2), (0, 4, 9, 10), steps_per_epoch=5) == [0.1, 0.5, 1, 1]


def test_epochs_that_the_schedule_does_not_fit(caplog) -> None:
    Step(milestones=[22, 28, 32], warmup_epochs=1).check_epochs(33)
    assert not caplog.records
    Step(milestones=[22, 28, 32]).check_epochs(28)
    assert "milestones: 28, 32 not reached, training.epochs is 28" in caplog.text
    for schedule in (Step(warmup_epochs=5), Cosine(warmup_epochs=5)):
        with pytest.raises(UserError, match=r"warmup_epochs: 5, but training.epochs is 4"):
            schedule.check_epochs(4)


def test_cosine() -> None:
    assert rates(Cosine(), (0, 100, 200, 300, 400)) == [1, 0.85355339, 0.5, 0.14644661, 0]
    assert rates(Cosine(final_share=0.2, warmup_epochs=20), (0, 199, 200, 300, 400)) == [0.005, 1, 1, 0.6, 0.2]


def test_polynomial() -> None:
    assert rates(Polynomial(), (0, 100, 200, 300, 400)) == [1, 0.5625, 0.25, 0.0625, 0]
    assert rates(Polynomial(power=1.0, warmup_epochs=10), (49, 99, 100, 250, 399)) == [0.5, 1, 1, 0.5, 0.00333333]


def test_plateau() -> None:
    schedule = Plateau(patience=2, stop_patience=4)
    factors, stops = [], []
    for epoch, score in enumerate([0.5, 0.6, 0.6, 0.59, 0.61, 0.6, 0.6, 0.6, 0.61], start=1):
        schedule.observe(epoch, score)
        factors += rates(schedule, (epoch,), 1)
        stops.append(schedule.stops)
        again = Plateau(patience=2, stop_patience=4)
        again.load_state_dict(schedule.state_dict())
        schedule = again
    # Best at epochs 2 and 5: falls two epochs after each, and two after the second fall; ends four after the second
    assert factors == [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 1e-3]
    assert stops == [False] * 8 + [True]
    endless = Plateau(patience=1, stop_patience=None)
    for epoch in (5, 10, 15):  # validation every fifth epoch
        endless.observe(epoch, 0.5)
    assert rates(endless, (0,)) == [0.01] and not endless.stops


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Step(milestones=[5, 2]), r"training\.lr_schedule\.milestones: \[5, 2\]; rising epochs"),
        (lambda: Step(milestones="abc"), r"training\.lr_schedule\.milestones: 'abc'"),
        (lambda: Step(milestones=3), r"training\.lr_schedule\.milestones: 3"),
        (lambda: Step(warmup_epochs="x"), r"training\.lr_schedule\.warmup_epochs: 'x'"),
        (lambda: Cosine(final_share=2.0), r"training\.lr_schedule\.final_share: 2\.0"),
        (lambda: Polynomial(power=0), r"training\.lr_schedule\.power: 0"),
        (lambda: Plateau(patience=0), r"training\.lr_schedule\.patience: 0"),
        (lambda: Plateau(stop_patience=0), r"training\.lr_schedule\.stop_patience: 0"),
    ],
)
def test_values_that_cannot_work(build, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()

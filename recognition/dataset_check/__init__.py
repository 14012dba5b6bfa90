"""What a training set would do to a run, told before hours of it: `check_training_set`."""

from recognition.dataset_check.check import (
    CheckSettings,
    TrainingCheckSettings,
    check_before_training,
    check_training_set,
)
from recognition.dataset_check.findings import ERROR, WARNING, Finding, Outcome

__all__ = [
    "ERROR",
    "WARNING",
    "CheckSettings",
    "Finding",
    "Outcome",
    "TrainingCheckSettings",
    "check_before_training",
    "check_training_set",
]

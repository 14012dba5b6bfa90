"""What a training set would do to a run, told before hours of it: `check_training_set`."""

from recognition.dataset_check.check import CheckSettings, check_training_set
from recognition.dataset_check.findings import ERROR, WARNING, Finding, Outcome

__all__ = ["ERROR", "WARNING", "CheckSettings", "Finding", "Outcome", "check_training_set"]

"""What a recogniser was trained on and with, kept in its file: a few numbers and names, no paths and no identities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from utils.version import code_version


def training_provenance(
    head: nn.Module, *, identities: int, images: int, images_per_step: int, steps: int
) -> dict[str, Any]:
    """The `provenance` of a backbone that recognition.train writes, JSON values.

    head: of which the class and its settings (scale, margin, ...) are kept. images: of the training set.
    images_per_step: over all processes. Rates, augmentation and so on stand in the run's checkpoints.
    """
    values = {name: value for name, value in vars(head).items() if isinstance(value, bool | int | float)}
    values = {name: value for name, value in values.items() if name != "training" and not name.startswith("_")}
    return {
        "identities": identities,
        "images": images,
        "steps": steps,
        "images_per_step": images_per_step,
        "head": {"name": type(head).__name__, **values},
        "code": code_version(),
    }


def describe_provenance(provenance: Any) -> str:
    """One line for the reader; whatever JSON value a file has there."""
    if not isinstance(provenance, Mapping):
        return str(provenance)
    return ", ".join(
        f"{key} ({describe_provenance(value)})" if isinstance(value, Mapping) else f"{key} {value}"
        for key, value in provenance.items()
    )

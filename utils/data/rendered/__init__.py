"""Procedurally rendered people: data for the whole pipeline without a data set and without a download."""

from utils.data.rendered.dataset import read_ground_truth, render_dataset
from utils.data.rendered.identity import Identity, Nuisance, neutral_nuisance, sample_identity, sample_nuisance
from utils.data.rendered.render import LANDMARKS, render, render_with_landmarks

__all__ = [
    "LANDMARKS",
    "Identity",
    "Nuisance",
    "neutral_nuisance",
    "read_ground_truth",
    "render",
    "render_dataset",
    "render_with_landmarks",
    "sample_identity",
    "sample_nuisance",
]

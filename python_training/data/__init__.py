"""Corpora and the batches made from them."""

from __future__ import annotations

from .batches import Augmentation, CropSampler, augment
from .emodb import load_emodb
from .utterance import FeatureSet, Utterance, compute_features

__all__ = ["Augmentation", "CropSampler", "FeatureSet", "Utterance", "augment", "compute_features", "load_emodb"]

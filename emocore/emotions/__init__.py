"""The founding use: 171 emotion words, default stories, and the whole road from a model to emotion vectors."""

from __future__ import annotations

from . import corpus, evaluation, geometry, templates
from .extraction import Extraction, calibrate, extract
from .generation import Generated, generate
from .reading import Reading, read
from .words import CLUSTERS, WORDS, cluster_of, valence

__all__ = [
    "CLUSTERS",
    "WORDS",
    "Extraction",
    "Generated",
    "Reading",
    "calibrate",
    "cluster_of",
    "corpus",
    "evaluation",
    "extract",
    "generate",
    "geometry",
    "read",
    "templates",
    "valence",
]

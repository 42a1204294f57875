"""What a model computes of an image on the way to its answer: features that tell whether it knows such images.

Shapes: B images, P tiles, D width of the vision tower.
"""

import base64
from typing import Any, NamedTuple

import numpy as np
import torch

from data.collator import Batch
from runtime.run_files import Kind


class Examined(NamedTuple):
    """An image with its features, each part of unit length."""

    scores: list[float]  # log-probability of every class name
    tower: np.ndarray  # (2 D,) vision tower: pooled output and mean of the patches; (D,) of a tower that pools nothing
    state: np.ndarray  # (width,) language model: last hidden state before the answer


@torch.no_grad()
def compute_tower_features(base: Any, batch: Batch) -> np.ndarray:
    """(B, 2 D) of the base view, an image's first tile: what a classifier on the tower alone would see."""
    output = base.model.vision_tower(batch["pixel_values"][:, 0])
    patches = output.last_hidden_state.float()
    parts = [patches.mean(dim=1)]
    if output.pooler_output is not None:
        parts.insert(0, output.pooler_output.float())
    return np.concatenate([scale_to_unit(part.numpy(force=True)) for part in parts], axis=1)


def scale_to_unit(vectors: np.ndarray) -> np.ndarray:
    """Of length 1 along the last axis; zeros stay zeros."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


# ---- in a cache of scores: half precision, whose error of 0.0005 is far below the differences between images


def encode(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f2").tobytes()).decode()


def decode(text: str) -> np.ndarray:
    """(D,) fp32. Raises ValueError."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float32)


def _is_encoded(value: Any) -> bool:
    try:
        return isinstance(value, str) and len(found := decode(value)) > 0 and bool(np.isfinite(found).all())
    except ValueError:
        return False


ENCODED = Kind("an encoded vector", _is_encoded)

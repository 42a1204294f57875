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
    tower: np.ndarray  # (2 D,) vision tower: its pooled output, if it has one, else the mean; mean of the patches
    state: np.ndarray  # (width,) language model: last hidden state before the answer


@torch.no_grad()
def compute_tower_features(base: Any, batch: Batch) -> np.ndarray:
    """(B, 2 D) of the base view, an image's first tile: what a classifier on the tower alone would see."""
    output = base.model.vision_tower(batch["pixel_values"][:, 0])
    mean = output.last_hidden_state.float().mean(dim=1)
    pooled = mean if output.pooler_output is None else output.pooler_output.float()
    return np.concatenate([scale_to_unit(part.numpy(force=True)) for part in (pooled, mean)], axis=1)


def examine(base: Any, batch: Batch, scores: list[list[float]], states: list[np.ndarray]) -> list[Examined]:
    """The images of a batch with their scores and last hidden states."""
    return list(map(Examined, scores, compute_tower_features(base, batch), scale_to_unit(np.array(states))))


def scale_to_unit(vectors: np.ndarray) -> np.ndarray:
    """Of length 1 along the last axis; zeros stay zeros."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


# ---- in a cache of scores: half precision, whose error of 0.0005 is far below the differences between images


def encode(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f2").tobytes()).decode()


def decode(text: str) -> np.ndarray:
    """(D,) fp32. Raises ValueError."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float32)


def features_schema(config: Any) -> dict[str, Kind]:
    """Of the encoded features of an image, of a LLaVA-NeXT with this config."""
    return {name: _encoded(width) for name, width in feature_widths(config).items()}


def feature_widths(config: Any) -> dict[str, int]:
    return {"tower": 2 * config.vision_config.hidden_size, "state": config.text_config.hidden_size}


def _encoded(width: int) -> Kind:
    def holds(value: Any) -> bool:
        try:
            return isinstance(value, str) and len(found := decode(value)) == width and bool(np.isfinite(found).all())
        except ValueError:
            return False

    return Kind(f"{width} encoded numbers", holds)

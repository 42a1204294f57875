"""Tests of synthetic."""

import io
import itertools

import numpy as np
import torch
from PIL import Image

from data.synthetic import SIDE, SPECIES, SPLIT_SIZES, draw_split


def mean_colors(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows = draw_split(split)
    colors = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).mean((0, 1)) / 255 for row in rows]
    return torch.tensor(np.array(colors), dtype=torch.float32), torch.tensor([row["label"] for row in rows])


def test_species_differ_in_two_features_or_in_shape_alone():
    species = list(SPECIES.values())
    differing = []
    for first, second in itertools.combinations(species, 2):
        differing.append({name for name in first._fields if getattr(first, name) != getattr(second, name)})
    assert all(len(names) >= 2 or names == {"shape"} for names in differing)
    assert sum(names == {"shape"} for names in differing) == 2


def test_images_are_the_same_every_time_and_differ_from_each_other(monkeypatch):
    monkeypatch.setitem(SPLIT_SIZES, "train", 30)
    rows = draw_split("train")
    assert rows == draw_split("train")
    assert len({row["image"]["bytes"] for row in rows}) == 30
    assert Image.open(io.BytesIO(rows[0]["image"]["bytes"])).size == (SIDE, SIDE)


def test_mean_color_alone_classifies_fewer_than_half(monkeypatch):
    """Softmax regression on the three mean channels, fitted to convergence."""
    monkeypatch.setitem(SPLIT_SIZES, "train", 1000)
    (colors, labels), (test_colors, truth) = mean_colors("train"), mean_colors("test")
    mean, spread = colors.mean(0), colors.std(0)
    features = torch.cat([(colors - mean) / spread, torch.ones(len(colors), 1)], dim=1)
    weights = torch.zeros(4, len(SPECIES), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(features @ weights, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    seen = torch.cat([(test_colors - mean) / spread, torch.ones(len(test_colors), 1)], dim=1)
    accuracy = ((seen @ weights).argmax(1) == truth).float().mean().item()
    print(f"top-1 from mean color: {accuracy:.3f}")
    assert 0.15 < accuracy < 0.5

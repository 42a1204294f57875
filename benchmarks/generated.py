"""Images and class names that the benchmark trains on."""

import io
import itertools
import random
from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from PIL import Image

from data.dataset import ROW, PlantData
from data.oxford_flowers import CLASS_NAMES

IMAGES = 64  # different ones, used in turn


def make_names(count: int) -> Sequence[str]:
    """The 102 flowers' names, or so many pairs of their words."""
    if count == len(CLASS_NAMES):
        return CLASS_NAMES
    words = sorted({word for name in CLASS_NAMES for word in name.split()})
    return random.Random(0).sample([" ".join(pair) for pair in itertools.permutations(words, 2)], count)


def make_data(sizes: list[tuple[int, int]], class_names: Sequence[str], count: int) -> PlantData:
    """A PlantData of JPEG images of these (W, H) in turn: smooth noise, which decodes and resizes like photographs.

    An image's class is always the same, so that long training makes the model sure, as a search of names needs.
    """
    generator = np.random.default_rng(0)
    files = []
    for image in itertools.islice(itertools.cycle(sizes), IMAGES):
        coarse = Image.fromarray(generator.integers(0, 255, (image[1] // 8 + 1, image[0] // 8 + 1, 3), np.uint8))
        coarse.resize(image, Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG", quality=90)
        files.append(file.getvalue())
    labels = [i % IMAGES % len(class_names) for i in range(count)]
    rows = [
        {"image": {"bytes": files[i % IMAGES], "path": None}, "label": label, "id": f"generated-{i}"}
        for i, label in enumerate(labels)
    ]
    train = Dataset.from_list(rows, features=ROW)
    return PlantData(train, None, train, list(class_names), "generated images")

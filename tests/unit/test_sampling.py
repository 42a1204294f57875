"""Class balance and augmentation: what an epoch shows, in any process and after any resume."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data.rows import build_rows
from data.sampling import TrainRows, TrainSampler
from utils.image_utils import augment_image

LABELS = [0] * 90 + [1] * 9 + [2]
ROWS = build_rows((f"/{number}.png", label, str(number), "") for number, label in enumerate(LABELS))


def indices(seed, epoch, is_balanced):
    sampler = TrainSampler(ROWS, LABELS if is_balanced else None, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_rare_classes_come_more_often():
    """Of 90, 9 and 1 images the shares are as 9.49 to 3 to 1."""
    shown = Counter(LABELS[index] for epoch in range(60) for index in indices(0, epoch, True))
    assert sum(shown.values()) == 6000
    for label, root in enumerate((90**0.5, 3, 1)):
        assert shown[label] / 6000 == pytest.approx(root / (90**0.5 + 4), rel=0.05)
    once = Counter(indices(0, 0, True))
    assert once[99] in (7, 8) and {once[index] for index in range(90, 99)} == {2, 3} and max(once.values()) < 9


@pytest.mark.parametrize("is_balanced", [True, False])
def test_an_epoch_depends_on_seed_and_number_alone(is_balanced):
    assert indices(1, 3, is_balanced) == indices(1, 3, is_balanced)
    assert indices(1, 3, is_balanced) != indices(1, 4, is_balanced) != indices(2, 4, is_balanced)
    if not is_balanced:
        assert sorted(indices(1, 3, False)) == list(range(100))


def test_rows_are_augmented_in_another_way_in_each_epoch():
    rows = TrainRows(ROWS, 7)
    sampler = TrainSampler(rows, None, 7)
    seeds = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        seeds.append([rows[index]["augmentation_seed"] for index in range(5)])
    assert seeds[0] == seeds[2] and not set(seeds[0]) & set(seeds[1]) and len(set(seeds[0])) == 5


def test_an_augmented_image_shows_most_of_the_plant():
    ramp = np.linspace(0, 200, 300, dtype=np.uint8)
    image = Image.fromarray(np.stack([np.tile(ramp, (200, 1))] * 3, axis=-1))
    sizes, flips = set(), 0
    for seed in range(40):
        view = augment_image(image, seed)
        assert np.array_equal(view, augment_image(image, seed))
        assert 0.58 <= view.width * view.height / (image.width * image.height) <= 1
        sizes.add(view.size)
        columns = np.asarray(view).mean(axis=(0, 2))
        flips += columns[0] > columns[-1]
    assert len(sizes) > 30 and 8 < flips < 32

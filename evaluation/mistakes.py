"""Pictures of mistakes: which classes are confused, and which train images the worst mistakes resemble.

Shapes: n images, C classes, m train images, D width of a feature.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.sparse import csr_array
from scipy.spatial.distance import squareform

from data.taxonomy import LEVELS, Taxonomy
from evaluation.calibration import Calibration
from evaluation.metrics import SplitScores, confidence
from evaluation.reference import TrainImages
from models.features import scale_to_unit
from utils.image_utils import open_image
from utils.logging_utils import skip_failure
from utils.plot_utils import COLUMNS, Tile, plot_confusions, plot_tiles, shorten

MISTAKES, TILE_SIDE = 12, 320  # images of the contact sheet, and the pixels of each
MAX_CLASSES = 120  # of a picture: with more, names are too small


class Confusions(NamedTuple):
    """Of some classes, in an order that puts those that are alike beside each other."""

    labels: np.ndarray  # (K,) of the classes shown
    counts: np.ndarray  # (K, K) images by true class and predicted class
    groups: list[str]  # (K,) family, or else genus, of each; "" where it is not known
    order: str  # in words
    elsewhere: int  # mistakes that are not among these classes


def count_confusions(split: SplitScores, taxonomy: Taxonomy | None, names: Sequence[str]) -> Confusions:
    """Those of all classes that occur, or of those that are confused most."""
    pairs, wrong = (split.labels, split.scores.argmax(axis=1)), (~split.correct).astype(int)
    shape = (split.scores.shape[1],) * 2
    table, mistakes = (csr_array((weights, pairs), shape=shape) for weights in (np.ones_like(wrong), wrong))
    both = mistakes + mistakes.T
    shown = np.flatnonzero(table.sum(axis=0) + table.sum(axis=1))
    if len(shown) > MAX_CLASSES:
        shown = np.sort(np.argsort(-both.sum(axis=1), kind="stable")[:MAX_CLASSES])
    if taxonomy and any(map(any, taxonomy.values())):
        keys = [*(taxonomy[level] for level in reversed(LEVELS)), names]
        shown = np.array(sorted(shown, key=lambda label: [key[int(label)] or "~" for key in keys]))  # unknown ones last
        level = "family" if any(taxonomy["family"]) else "genus"
        groups, order = [taxonomy[level][label] for label in shown], f"{level} (framed) and name"
    else:
        shown, order = shown[_order_by_confusion(both[shown][:, shown].toarray())], "confusion"
        groups = [""] * len(shown)
    counts = table[shown][:, shown].toarray()
    return Confusions(shown, counts, groups, order, int(wrong.sum() - counts.sum() + np.trace(counts)))


def _order_by_confusion(both: np.ndarray) -> np.ndarray:
    """Leaves of average-linkage clustering; classes are the nearer the more of their images are confused."""
    if len(both) < 3 or not both.any():
        return np.arange(len(both))
    sizes = np.maximum(both.sum(axis=1), 1)
    distances = 1 - both / np.sqrt(np.outer(sizes, sizes))
    np.fill_diagonal(distances, 0)
    return leaves_list(linkage(squareform(distances, checks=False), "average"))


def find_nearest(features: np.ndarray, train_features: np.ndarray, count: int) -> np.ndarray:
    """(n, count) places of the train images (m, D) whose features are nearest to those of images (n, D), by cosine."""
    unit, train_unit = (scale_to_unit(each.astype("f4")) for each in (features, train_features))
    return np.argsort(-(unit @ train_unit.T), axis=1, kind="stable")[:, :count]


# ---- pictures


def write_mistakes(
    split: SplitScores,
    rows: Dataset,
    calibration: Calibration | None,
    names: Sequence[str],
    stem: Path,
    train: TrainImages | None,
) -> None:
    """<stem>_confusions.png, and with train images, if `split` has features, <stem>_mistakes.png."""
    with skip_failure(f"{stem}_confusions.png"):
        found = count_confusions(split, calibration and calibration.taxonomy, names)
        title = f"{len(split.ids):,} images by true and predicted class, ordered by {found.order}"
        if MAX_CLASSES == len(found.labels) < len(names):
            title += f"; the {len(found.labels)} most confused of {len(names):,} classes"
            title += f", which {found.elsewhere:,} mistakes are not among"
        shown = [names[label] for label in found.labels]
        plot_confusions(found.counts, shown, found.groups, title, f"{stem}_confusions.png")
    wrong = np.flatnonzero(~split.correct)
    with skip_failure(f"{stem}_mistakes.png"):
        Path(f"{stem}_mistakes.png").unlink(missing_ok=True)  # of other weights
        if train is not None and len(wrong):
            confidences = confidence(split.scores[wrong], calibration.temperature if calibration else 1)
            worst = wrong[np.argsort(-confidences, kind="stable")][:MISTAKES]
            plot_tiles(list(_list_tiles(split, worst, rows, names, train)), f"{stem}_mistakes.png")


def _list_tiles(
    split: SplitScores, worst: np.ndarray, rows: Dataset, names: Sequence[str], train: TrainImages
) -> Iterator[Tile]:
    """Each mistake, then the train images that are nearest to it: green ones are of the true class, red ones of the
    predicted class.
    """
    place = {sample: index for index, sample in enumerate(rows["id"])}
    nearest = find_nearest(split.features["tower"][worst], train.features, COLUMNS - 1)
    for index, neighbors in zip(worst, nearest):
        truth, predicted = split.labels[index], split.scores[index].argmax()
        image = open_image(rows[place[split.ids[index]]]["image"], TILE_SIDE)
        yield Tile(image, f"is: {shorten(names[truth])}\npredicted: {shorten(names[predicted])}", "black")
        for neighbor in neighbors:
            row = train.rows[int(neighbor)]
            color = {truth: "darkgreen", predicted: "darkred"}.get(row["label"], "gray")
            yield Tile(open_image(row["image"], TILE_SIDE), f"train:\n{shorten(names[row['label']])}", color)
        yield from [Tile(None, "", "black")] * (COLUMNS - 1 - len(neighbors))

"""Where a model looked: how much less certain its answer becomes when a part of the image is hidden.

A window of 2 x 2 cells moves over a grid of GRID x GRID cells, cell by cell, in the mean color of the image's border
(occlusion, Zeiler & Fergus 2014). The image is scored anew for each of its (GRID + 1)^2 places, so a map takes 65
forward passes. It needs no gradient, which any back end of attention and 4-bit weights would have to give.

Shapes: H, W height and width of the image in pixels.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.special import logsumexp

from data.collator import PlantCollator
from evaluation.predictor import Prediction, Predictor
from evaluation.report import percent
from models.builder import PlantModel
from runtime.atomic import beside, sync
from utils.image_utils import fit_image, open_image, png_image
from utils.logging_utils import logger
from utils.plot_utils import LEAST_DROP, plot_map, shorten

GRID = 7  # cells along each side of an image
NAMES = 5  # the answer and those that it is compared with
MAX_SIDE = 1344  # pixels of what is scored; the tiles of LLaVA-NeXT show 1,008 at the most
SHOWN_SIDE = 640  # pixels of the picture


def explain(predictor: Predictor, image: str, found: Prediction, out: Path) -> None:
    """A PNG, whole or none at all, of where the model looked for an image's likeliest name. Raises ImageError."""
    name, share = found.likeliest[0]
    shown, drops = find_parts(predictor.plant, image, [name for name, _ in found.likeliest])
    doubt = "none of these; nearest: " if found.is_none_of_these else "" if found.is_confident else "not sure: "
    caption = f"{doubt}{shorten(name)} {percent(share)}"
    if drops.max() < LEAST_DROP:
        caption += "\nhiding any one part changes little"
    draft, _ = beside(out)
    try:
        plot_map(shown, drops, caption, draft)
        sync(draft)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    logger.info(f"saved | {out} | brighter: the model is less certain of the name with this part hidden")


def find_parts(plant: PlantModel, image: str | Path | dict, names: Sequence[str]) -> tuple[Image.Image, np.ndarray]:
    """Where the model looked for the first of an image's likeliest class names. Raises ImageError.

    The image, upright, at most SHOWN_SIDE pixels wide and high; and (GRID, GRID) drops in nats of the log-odds of this
    name against the next four: a probability that is all but 1 hardly moves, and for many classes a map takes no
    longer. Below 0: likelier without that part.
    """
    opened, image_size = open_image(image), plant.collator.image_size
    fitted = fit_image(opened, image_size)
    fitted.thumbnail((MAX_SIDE, MAX_SIDE))
    collator = PlantCollator(plant.processor, plant.prompt, names[:NAMES], image_size)
    rows, scores = Occluded(fitted), np.zeros((GRID + 1) ** 2 + 1)
    for results, _ in dataclasses.replace(plant, collator=collator, num_workers=0).score(rows):
        for sample, values in results:
            scores[int(sample.id)] = values[0] - logsumexp(values[1:])
    windows = (scores[0] - scores[1:]).reshape(GRID + 1, GRID + 1)
    drops = np.lib.stride_tricks.sliding_window_view(windows, (2, 2)).mean(axis=(2, 3))  # four windows hide a cell
    opened.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return opened, drops


class Occluded:
    """Rows of an image: itself, then with the window in each place, row by row. Made when they are asked for."""

    def __init__(self, image: Image.Image):
        self.pixels = np.asarray(image)  # (H, W, 3)
        edges = [self.pixels[0], self.pixels[-1], self.pixels[:, 0], self.pixels[:, -1]]
        self.color = np.concatenate(edges).mean(axis=0)

    def __len__(self) -> int:
        return 1 + (GRID + 1) ** 2

    def __getitem__(self, index: int) -> dict:
        pixels = self.pixels.copy()
        if index:
            row, column = divmod(index - 1, GRID + 1)
            pixels[self._span(row, 0), self._span(column, 1)] = self.color
        return {"image": png_image(Image.fromarray(pixels), compress_level=0), "label": 0, "id": str(index)}

    def _span(self, place: int, axis: int) -> slice:
        """The pixels of cells `place` - 1 and `place`; at least one, where an image has fewer pixels than cells."""
        length = self.pixels.shape[axis]
        start = min(max(place - 1, 0) * length // GRID, length - 1)
        return slice(start, max(min(place + 1, GRID) * length // GRID, start + 1))

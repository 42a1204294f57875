"""Synthetic images of flowers, ten invented species: the data set of the tiny preset, the same on every machine.

Two species differ in at least two of petal count, petal shape, color and center; the star- and moonworts of one color
differ in petal shape alone. Background, size, place, rotation and hue vary, so that the mean color of an image gives
away little (measured in docs/LOG.md).
"""

import colorsys
import itertools
import math
import random
from typing import NamedTuple

from PIL import Image, ImageDraw

from utils.image_utils import png_image

SIDE = 84  # pixels of a square image
OVERSAMPLING = 2  # rendered larger and scaled down, since ImageDraw does not smooth edges
SPLIT_SIZES = {"train": 4000, "validation": 300, "test": 300}  # images


class Species(NamedTuple):
    petals: int
    shape: str
    color: str
    center: str


SPECIES = {
    "amber starwort": Species(5, "pointed", "amber", "dark"),
    "amber moonwort": Species(5, "round", "amber", "dark"),
    "amber wheelbloom": Species(9, "strap", "amber", "green"),
    "rosy trillet": Species(3, "round", "rosy", "golden"),
    "rosy heartcup": Species(5, "notched", "rosy", "green"),
    "rosy wheelbloom": Species(9, "strap", "rosy", "dark"),
    "violet starwort": Species(6, "pointed", "violet", "golden"),
    "violet moonwort": Species(6, "round", "violet", "golden"),
    "violet heartcup": Species(4, "notched", "violet", "dark"),
    "ivory trillet": Species(3, "pointed", "ivory", "green"),
}
COLORS = {  # hue, saturation and value, each 0 to 1
    "amber": (0.12, 0.9, 0.95),
    "rosy": (0.94, 0.65, 0.92),
    "violet": (0.75, 0.6, 0.8),
    "ivory": (0.13, 0.08, 0.97),
}
CENTERS = {"dark": (60, 30, 30), "green": (90, 150, 60), "golden": (240, 200, 40)}
HALF_WIDTHS = {"round": 0.46, "pointed": 0.19, "notched": 0.42, "strap": 0.13}  # of a petal, in petal lengths


def draw_split(split: str) -> list[dict]:
    """Rows {image: {bytes, path}, label, id}, classes in turn; a row depends on its split and index alone."""
    rows = []
    for index, species in zip(range(SPLIT_SIZES[split]), itertools.cycle(SPECIES.values())):
        image = png_image(draw_flower(species, random.Random(f"{split} {index}")), compress_level=1)
        rows.append({"image": image, "label": index % len(SPECIES), "id": f"{split}-{index:05d}"})
    return rows


def draw_ood_images(count: int = 40) -> dict[str, list[dict]]:
    """{kind: rows} of out-of-distribution images, without a plant: noise, plain color, stripes; label 0 is unused."""
    return {kind: [_draw_ood_image(kind, index) for index in range(count)] for kind in ("noise", "plain", "stripes")}


def _draw_ood_image(kind: str, index: int) -> dict:
    rng = random.Random(f"{kind} {index}")
    color, stripe_color = _background_color(rng.random(), rng), _background_color(rng.random(), rng)
    image = Image.new("RGB", (SIDE, SIDE), color)
    if kind == "noise":
        image = Image.frombytes("RGB", (SIDE, SIDE), rng.randbytes(3 * SIDE * SIDE))
    elif kind == "stripes":
        pen, width = ImageDraw.Draw(image), rng.randint(3, 12)
        for start in range(0, 2 * SIDE, 2 * width):
            pen.line((start, 0, start - SIDE // 2, SIDE), fill=stripe_color, width=width)
    return {"image": png_image(image), "label": 0, "id": f"{kind}-{index:05d}"}


def draw_flower(species: Species, rng: random.Random) -> Image.Image:
    """An image of one flower, SIDE x SIDE pixels, RGB."""
    side = SIDE * OVERSAMPLING
    hue = rng.random()
    image = Image.new("RGB", (side, side), _background_color(hue, rng))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 2)):
        x, y, radius = rng.random() * side, rng.random() * side, rng.uniform(0.08, 0.35) * side
        height = radius * rng.uniform(0.3, 1)
        color = _background_color(hue + rng.uniform(-0.15, 0.15), rng)
        pen.ellipse((x - radius, y - height, x + radius, y + height), fill=color)
    _draw_blossom(pen, species, rng, side)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def _draw_blossom(pen: ImageDraw.ImageDraw, species: Species, rng: random.Random, side: int) -> None:
    radius = side * rng.uniform(0.38, 0.5)
    x, y = (rng.uniform(0.9 * radius, side - 0.9 * radius) for _ in range(2))
    start = rng.random() * 2 * math.pi
    hue, saturation, value = COLORS[species.color]
    hue += rng.uniform(-0.03, 0.03)
    saturation *= rng.uniform(0.8, 1.1)
    value *= rng.uniform(0.85, 1.05)
    for petal in range(species.petals):
        angle = start + 2 * math.pi * petal / species.petals + rng.uniform(-0.05, 0.05)
        length = radius * rng.uniform(0.93, 1.05)
        cos, sin = length * math.cos(angle), length * math.sin(angle)
        outline = [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _petal(species)]
        fill = _rgb(hue, saturation, value * rng.uniform(0.93, 1.02))
        pen.polygon(outline, fill=fill, outline=_rgb(hue, saturation, 0.6 * value), width=OVERSAMPLING)
    center = radius * rng.uniform(0.2, 0.26)
    pen.ellipse((x - center, y - center, x + center, y + center), fill=CENTERS[species.center], outline=(40, 40, 30))


def _petal(species: Species) -> list[tuple[float, float]]:
    """Outline of a petal along the u axis, from the center at u = 0 to the tip at u = 1."""
    half_width = HALF_WIDTHS[species.shape] * (1.25 if species.petals <= 3 else 1)
    along = [step / 16 for step in range(17)]
    if species.shape == "round":
        half = [(0.15 + 0.85 * u, half_width * math.sin(math.pi * u**0.8)) for u in along]
    elif species.shape == "pointed":
        half = [(u, 1.25 * half_width * math.sin(math.pi * u**0.7) * (1 - u) ** 0.5) for u in along]
    elif species.shape == "strap":
        half = [(u, half_width * min(1, 4 * u) * min(1, 8 * (1 - u) + 0.35)) for u in along]
    else:  # notched: the tip is drawn in
        half = [(u, half_width * math.sin(0.86 * math.pi * u)) for u in along[:-1]] + [(0.72, 0)]
    return half + [(u, -v) for u, v in reversed(half)]


def _background_color(hue: float, rng: random.Random) -> tuple[int, ...]:
    return _rgb(hue, rng.uniform(0.05, 0.45), rng.uniform(0.15, 0.9))


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    return tuple(int(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(value, 1)))

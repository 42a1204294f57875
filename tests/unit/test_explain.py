"""Maps of where a model looked, against models of which it is known."""

import io
import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import logsumexp

from data import synthetic
from data.synthetic import SPECIES, draw_flower
from evaluation.explain import GRID, MAX_SIDE, NAMES, SHOWN_SIDE, Occluded, explain, find_parts
from evaluation.predictor import Prediction, load_predictor
from models.builder import PlantModel
from runtime.run_dir import Run
from utils.image_utils import ImageError, fit_image, open_image
from utils.plot_utils import LEAST_DROP, blend_map


@pytest.fixture
def looks_at(tiny, monkeypatch):
    """looks_at(find, image_size) is a model of two names; find(pixels) is how far the first is ahead, in nats."""
    seen: list[tuple[int, ...]] = []

    def make(find, image_size=None) -> tuple[PlantModel, list]:
        def score(self, rows):
            for row in map(rows.__getitem__, range(len(rows))):
                pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
                seen.append(pixels.shape)
                yield [(self.collator.describe(row, pixels.shape[:2]), [find(pixels), 0.0])], []

        monkeypatch.setattr(PlantModel, "score", score)
        plant = PlantModel(None, tiny.processor, tiny.prompt, tiny.collator, "no", torch.device("cpu"))
        plant.collator = type(tiny.collator)(tiny.processor, tiny.prompt, tiny.names, image_size)
        return plant, seen

    return make


def red(pixels) -> float:
    return float((pixels[..., 0].astype(int) - pixels[..., 1] > 100).mean() * 50)


@pytest.mark.parametrize("size", [(210, 210), (700, 70), (70, 210), (2100, 140)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_map_is_bright_where_the_answer_comes_from(size, orientation, looks_at, tiny, tmp_path):
    """A red patch in one cell of the upright image, whatever its shape and EXIF rotation."""
    pixels = np.full((size[1], size[0], 3), 90, dtype=np.uint8)
    (height, width), (row, column) = pixels.shape[:2], (1, 4)
    pixels[row * height // GRID : (row + 1) * height // GRID, column * width // GRID : (column + 1) * width // GRID] = (
        250,
        20,
        20,
    )
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    image = image if orientation == 1 else image.transpose(Image.Transpose.ROTATE_90)  # 6: turned back when shown
    image.save(tmp_path / "a.png", exif=exif)
    plant, seen = looks_at(red)
    shown, drops = find_parts(plant, tmp_path / "a.png", tiny.names[:2])
    assert drops.shape == (GRID, GRID) and np.unravel_index(drops.argmax(), drops.shape) == (row, column)
    near = drops[row - 1 : row + 2, column - 1 : column + 2].sum()
    assert near == pytest.approx(drops.sum(), rel=0.03) and drops.max() > 0.1
    assert max(shown.size) <= SHOWN_SIDE and abs(shown.width / shown.height / (width / height) - 1) < 0.05
    assert len(seen) == (GRID + 1) ** 2 + 1 and max(map(max, seen)) <= MAX_SIDE


def test_the_caption_is_the_answer_of_the_line(monkeypatch, tmp_path):
    captions = []
    monkeypatch.setattr("evaluation.explain.find_parts", lambda *_: (None, np.ones((GRID, GRID))))
    monkeypatch.setattr(
        "evaluation.explain.plot_map",
        lambda shown, drops, caption, path: path.write_text(captions.append(caption) or ""),
    )
    confident = Prediction([("oak", 0.9)], True)
    for found in (confident, confident._replace(is_confident=False), confident._replace(strangeness=0.1)):
        explain(SimpleNamespace(plant=None), "a.png", found, tmp_path / "map.png")
    assert captions == ["oak 90%", "not sure: oak 90%", "none of these; nearest: oak 90%"]


def test_what_speaks_against_the_answer_is_below_zero_and_dark(looks_at, tiny, tmp_path):
    pixels = np.full((70, 70, 3), 90, dtype=np.uint8)
    pixels[10:20, 10:20], pixels[50:60, 50:60] = (250, 20, 20), (20, 250, 20)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    plant, _ = looks_at(lambda pixels: red(pixels) - red(pixels[..., ::-1][..., [1, 2, 0]]))
    shown, drops = find_parts(plant, tmp_path / "a.png", tiny.names[:2])
    assert drops[1, 1] > 0 > drops[5, 5]
    colors = np.asarray(blend_map(shown, drops)).astype(int)
    assert np.ptp(colors[15, 15]) > 50 and np.ptp(colors[55, 55]) == 0  # in color, and gray
    assert np.ptp(np.asarray(blend_map(shown, drops / 1e6)).astype(int), axis=2).max() < 20  # noise is not blown up


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (5, 2)])
def test_images_of_fewer_pixels_than_cells(size, looks_at, tiny, tmp_path):
    Image.new("RGB", size, (250, 20, 20)).save(tmp_path / "a.png")
    plant, _ = looks_at(red)
    shown, drops = find_parts(plant, tmp_path / "a.png", tiny.names[:2])
    assert np.allclose(drops, 0) and blend_map(shown, drops).size == shown.size


def test_what_is_scored_is_the_image_as_the_model_sees_it(looks_at, tiny, tmp_path):
    Image.new("RGB", (300, 50)).save(tmp_path / "a.png")
    plant, seen = looks_at(red, 70)
    find_parts(plant, tmp_path / "a.png", tiny.names[:2])
    assert set(seen) == {(70, 70, 3)}
    (tmp_path / "b.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match="is not an image"):
        find_parts(plant, tmp_path / "b.png", tiny.names[:2])


def test_hidden_parts_have_the_color_of_the_border():
    pixels = np.full((70, 70, 3), 200, dtype=np.uint8)
    pixels[10:60, 10:60] = 0
    rows = Occluded(Image.fromarray(pixels))
    first, hidden = (np.asarray(Image.open(io.BytesIO(rows[place]["image"]["bytes"]))) for place in (0, 1 + 8 * 3 + 2))
    assert (first == pixels).all() and (hidden[20:40, 10:30] == 200).all()
    hidden = hidden.copy()
    hidden[20:40, 10:30] = 0
    assert (hidden == pixels).all()


def test_a_cell_of_the_map_is_what_four_hidden_images_lose(trained, tmp_path):
    """The probabilities of images that were made here, of a real model."""
    predictor = load_predictor(Run.load(trained))
    fitted = fit_image(open_image(sorted((trained / "examples").glob("*.jpg"))[0]), predictor.plant.collator.image_size)
    image, pixels = tmp_path / "whole.png", np.asarray(fitted)
    fitted.save(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).mean(axis=0)
    paths, side = [image], len(pixels)
    for row, column in itertools.product((2, 3), (4, 5)):
        hidden = pixels.copy()
        hidden[(row - 1) * side // 7 : (row + 1) * side // 7, (column - 1) * side // 7 : (column + 1) * side // 7] = (
            border
        )
        paths.append(tmp_path / f"{row} {column}.png")
        Image.fromarray(hidden).save(paths[-1])
    found = [dict(found.likeliest) for found in predictor.predict(paths)]
    names = list(found[0])
    scores = [predictor.calibration.temperature * np.log([shares[name] for name in names[:NAMES]]) for shares in found]
    whole, *lost = [each[0] - logsumexp(each[1:]) for each in scores]
    _, drops = find_parts(predictor.plant, image, names)
    assert drops[2, 4] == pytest.approx(whole - np.mean(lost), abs=1e-4) and abs(drops[2, 4]) > 1e-3


def draw_with_mask(index: int, monkeypatch) -> tuple[Image.Image, np.ndarray]:
    """A synthetic image of test, and where its flower is: what stays as it is on another background."""
    species, seed = list(SPECIES.values())[index % len(SPECIES)], f"test {index}"
    image, background = draw_flower(species, random.Random(seed)), synthetic._background_color
    with monkeypatch.context() as patch:
        patch.setattr(
            synthetic, "_background_color", lambda *args: tuple((part + 128) % 256 for part in background(*args))
        )
        other = draw_flower(species, random.Random(seed))
    change = np.abs(np.asarray(image).astype(int) - np.asarray(other))
    return image, change.max(axis=2) < 64


@pytest.mark.slow
def test_the_demo_looks_at_the_flower(demo_run, monkeypatch, tmp_path):
    """Share of each map's mass inside the flower, against the flower's share of the image."""
    predictor, inside, area, at_top, flat = load_predictor(Run.load(demo_run)), [], [], [], 0
    for index in range(20):
        image, is_flower = draw_with_mask(index, monkeypatch)
        image.save(tmp_path / "a.png")
        (found,) = predictor.predict([tmp_path / "a.png"])
        _, drops = find_parts(predictor.plant, tmp_path / "a.png", [name for name, _ in found.likeliest])
        if drops.max() < LEAST_DROP:  # it says so, and has no color
            flat += 1
            continue
        mass = Image.fromarray(np.maximum(drops, 0).astype(np.float32))
        mass = np.asarray(mass.resize(image.size, Image.Resampling.BILINEAR))
        inside.append(mass[is_flower].sum() / mass.sum())
        area.append(is_flower.mean())
        at_top.append(is_flower[np.unravel_index(mass.argmax(), mass.shape)])
    print(f"in the flower {np.mean(inside):.3f}, its area {np.mean(area):.3f}, brightest there {np.mean(at_top):.2f}")
    assert flat <= 4 and 0.2 < np.mean(area) < 0.5
    assert np.mean(inside) > 1.7 * np.mean(area) and np.mean(at_top) >= 0.85

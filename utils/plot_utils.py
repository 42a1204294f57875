"""Pictures of a run, drawn without a display."""

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from utils.logging_utils import logger

GPU_SIZES = (4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 80, 141)  # GiB, marked where a picture shows memory
COLUMNS = 4  # of a grid of images
MAP_COLORS = "inferno"  # of a map over an image, dark to bright; color-blind people read it too
LEAST_DROP = 0.1  # nats: the odds of an answer are a tenth less
no_tex = matplotlib.rc_context({"text.usetex": False})  # a user's matplotlibrc may hand all text to TeX
plain_text = matplotlib.rc_context({"text.usetex": False, "text.parse_math": False})  # a dollar of a name is a dollar


class Tile(NamedTuple):
    """An image of a grid, None: no image, with what stands above it."""

    image: Image.Image | None
    caption: str
    color: str


@no_tex
def plot_training(metrics: Sequence[dict], path: str | Path) -> None:
    """Loss, validation accuracy, learning rate and gradient norm by optimizer step, from the lines of metrics.jsonl."""
    has_evaluations = any("eval_loss" in line for line in metrics)
    figure = Figure(figsize=(8, 12 if has_evaluations else 9))
    figure.subplots_adjust(left=0.13, right=0.97, top=0.98, bottom=0.06, hspace=0.06)
    loss, *accuracy, rate, norm = figure.subplots(4 if has_evaluations else 3, 1, sharex=True)
    _curve(loss, metrics, "loss", "loss, nats per token", label="train")
    if has_evaluations:
        _curve(loss, metrics, "eval_loss", "loss, nats per token", label="val", marker="o")
        _curve(accuracy[0], metrics, "eval_top1", "top-1 accuracy on val", marker="o", color="C1")
        accuracy[0].set(ylim=(0, 1.02))
    loss.legend()
    _curve(rate, metrics, "learning_rate", "learning rate")
    _curve(norm, metrics, "grad_norm", "gradient norm before clipping")
    norm.set(xlabel="optimizer step", yscale="log")
    _save(figure, path, 100)


@plain_text
def plot_tiles(tiles: Sequence[Tile], path: str | Path) -> None:
    rows = -(-len(tiles) // COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 3.4 * rows), layout="constrained")
    for number, tile in enumerate(tiles, 1):
        _draw(figure.add_subplot(rows, COLUMNS, number), tile)
    _save(figure, path, 80)


@plain_text
def plot_report(
    accuracies: dict[str, float],
    bins: Sequence[tuple[float, float, int]],
    confused: Sequence[Tile],
    mistakes: Sequence[Tile],
    title: str,
    path: str | Path,
) -> None:
    """Accuracy by class, reliability by `bins` of (mean confidence, accuracy, images), confused classes, mistakes."""
    rows = [1.3, *[1] * (-(-len(confused) // COLUMNS) + -(-len(mistakes) // COLUMNS))]
    figure = Figure(figsize=(4 * COLUMNS, 4 * sum(rows)), layout="constrained")
    figure.suptitle(title, fontsize=16)
    grid = figure.add_gridspec(len(rows), COLUMNS, height_ratios=rows)
    bars = figure.add_subplot(grid[0, : COLUMNS - 1])
    ordered = sorted(accuracies.items(), key=lambda item: item[1])
    bars.bar(range(len(ordered)), [accuracy for _, accuracy in ordered], color="seagreen")
    size = 9 if len(ordered) <= 40 else 6
    names = [shorten(name, 24) for name, _ in ordered]
    bars.set_xticks(range(len(ordered)), names, rotation=90, fontsize=size)
    bars.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(-0.6, len(ordered) - 0.4))
    reliability = figure.add_subplot(grid[0, COLUMNS - 1])
    confidences, correct, counts = zip(*bins)
    areas = [20 + 400 * count / sum(counts) for count in counts]  # points squared
    reliability.plot([0, 1], [0, 1], color="gray", linestyle=":")
    reliability.scatter(confidences, correct, s=areas, color="seagreen")
    reliability.set(xlabel="confidence (area: images)", ylabel="accuracy", xlim=(-0.02, 1.05), ylim=(-0.02, 1.05))
    for index, tile in enumerate([*confused, *mistakes]):
        _draw(figure.add_subplot(grid[1 + index // COLUMNS, index % COLUMNS]), tile)
    _save(figure, path, 70)


@plain_text
def plot_map(image: Image.Image, drops: np.ndarray, caption: str, path: str | Path) -> None:
    """A PNG of an image under its map (rows, columns), with a scale; see blend_map."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.axis("off")
    figure.suptitle(caption, fontsize=13)  # above a narrow image a title of its axes would be cut off
    axes.imshow(blend_map(image, drops))
    scale = ScalarMappable(Normalize(0, _map_top(drops)), MAP_COLORS)
    figure.colorbar(scale, ax=axes, shrink=0.7, label="log-odds lost where hidden, nats")
    _save(figure, path, 100)


def blend_map(image: Image.Image, drops: np.ndarray) -> Image.Image:
    """The image in gray, in color where its map (rows, columns) is above 0: the brighter, the more."""
    shares = np.clip(drops / _map_top(drops), 0, 1).astype(np.float32)
    smooth = Image.fromarray(shares).resize(image.size, Image.Resampling.BICUBIC)
    shares = np.clip(np.asarray(smooth), 0, 1)
    colors = Image.fromarray(colormaps[MAP_COLORS](shares, bytes=True)[..., :3])
    opacity = Image.fromarray((255 * 0.8 * shares**0.5).astype(np.uint8))
    return Image.composite(colors, image.convert("L").convert("RGB"), opacity)


def _map_top(drops: np.ndarray) -> float:
    """What has the brightest color: of a map with hardly a drop not its noise."""
    return max(float(drops.max()), LEAST_DROP)


@plain_text
def plot_confusions(counts: np.ndarray, names: Sequence[str], groups: Sequence[str], title: str, path: str) -> None:
    """Images by true class (rows) and predicted class (columns), (K, K), colored by their share of the row.

    Classes of one group (K,), which stand beside each other, are framed.
    """
    side = max(0.2 * len(names), 4)  # inches: a name is 11 pixels high, and so is its row
    width, height, size = side + 2.6, side + 2.9, 6 if len(names) > 40 else 9
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((2.4 / width, 2.3 / height, side / width, side / height))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    is_right = np.eye(len(counts), dtype=bool)
    for mask, colors in ((~is_right, "Greens"), (is_right, "Reds")):
        visible = np.ma.masked_array(shares**0.5, mask | (counts == 0))  # a single mistake of many is seen too
        axes.imshow(visible, cmap=colors, vmin=0, vmax=1.3)
    for row, column in zip(*np.nonzero(counts)):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=size, color=color)
    places, labels = np.arange(len(names)), [shorten(name, 28) for name in names]
    axes.set_xticks(places, labels, rotation=90, fontsize=8)
    axes.set_yticks(places, labels, fontsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(places - 0.5, minor=True)
    axes.grid(which="minor", color="0.9", linewidth=0.5)
    axes.tick_params(which="both", length=0)
    for group, members in itertools.groupby(places, key=lambda place: groups[int(place)]):
        first, *rest = members
        if group and rest:
            axes.add_patch(Rectangle((first - 0.5, first - 0.5), len(rest) + 1, len(rest) + 1, fill=False, color="0.5"))
    axes.set(xlabel="predicted", ylabel="true")
    figure.text(0.5, 1 - 0.15 / height, title, ha="center", va="top", fontsize=11, wrap=True)
    _save(figure, path, 100)


@plain_text
def plot_speed(points: Sequence[tuple[str, float, float]], path: str | Path) -> None:
    """A curve for each system of the `points` (system, GiB, images/s): images/s over memory."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", xlabel="peak GPU memory, GiB", ylabel="images/s")
    for number, system in enumerate(dict.fromkeys(system for system, _, _ in points)):
        place = {"xytext": (6, -12)} if number else {"xytext": (-6, 4), "ha": "right"}  # out of the way of the first
        memory, rates = zip(*sorted((gib, rate) for name, gib, rate in points if name == system))
        axes.plot(memory, rates, marker="o", label=system)
        for gib, rate in zip(memory, rates):
            axes.annotate(f"{rate:.1f}", (gib, rate), textcoords="offset points", fontsize=9, **place)
    axes.set_ylim(0, 1.08 * max(rate for _, _, rate in points))
    low, high = axes.get_xlim()
    ticks = [gib for gib in GPU_SIZES if low <= gib <= high]
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    _save(figure, path, 100)


def _save(figure: Figure, path: str | Path, dpi: int) -> None:
    """One sentence in place of matplotlib's warnings, a line of code each, for characters that no font here has."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path, dpi=dpi, format="png")
    if any("missing from font" in str(warning.message) for warning in caught):
        logger.warning(f"{path}: shows boxes for characters that no installed font has; what is written is unaffected")


def _draw(axes, tile: Tile) -> None:
    axes.axis("off")
    axes.set(xticks=(), yticks=())  # which are laid out, seen or not: half the time of a sheet
    axes.set_title(tile.caption, fontsize=11, color=tile.color, y=1.0)  # else all above the image is looked at
    if tile.image is not None:
        axes.imshow(tile.image)


def _curve(axes, metrics: Sequence[dict], key: str, words: str, **style) -> None:
    lines = [line for line in metrics if key in line]
    axes.plot([line["step"] for line in lines], [line[key] for line in lines], **style)
    axes.set(ylabel=words)
    axes.grid(alpha=0.3)


def shorten(text: str, length: int = 32) -> str:
    """On one line, and cut to a length that fits above an image."""
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text if len(text) <= length else text[: length - 3] + "..."

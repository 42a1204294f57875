"""Pictures of a run, drawn without a display."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from PIL import Image

COLUMNS = 4  # of a grid of images


class Tile(NamedTuple):
    """An image of a grid, None: no image, with what stands above it."""

    image: Image.Image | None
    caption: str
    color: str


def plot_training(metrics: Sequence[dict], path: str | Path) -> None:
    """Loss, validation accuracy, learning rate and gradient norm by optimizer step, from the lines of metrics.jsonl."""
    steps = [line for line in metrics if "loss" in line]
    evaluations = [line for line in metrics if "eval_loss" in line]
    figure = Figure(figsize=(8, 12 if evaluations else 9))
    figure.subplots_adjust(left=0.13, right=0.97, top=0.98, bottom=0.06, hspace=0.06)
    loss, *accuracy, rate, norm = figure.subplots(4 if evaluations else 3, 1, sharex=True)
    _curve(loss, steps, "loss", label="train")
    if evaluations:
        _curve(loss, evaluations, "eval_loss", label="val", marker="o")
        _curve(accuracy[0], evaluations, "eval_top1", marker="o", color="C1")
        accuracy[0].set(ylabel="top-1 accuracy on val", ylim=(0, 1.02))
    loss.set(ylabel="loss, nats per token")
    loss.legend()
    _curve(rate, steps, "learning_rate")
    rate.set(ylabel="learning rate")
    _curve(norm, steps, "grad_norm")
    norm.set(ylabel="gradient norm before clipping", xlabel="optimizer step", yscale="log")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def plot_tiles(tiles: Sequence[Tile], path: str | Path) -> None:
    rows = -(-len(tiles) // COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 3.4 * rows), layout="constrained")
    places = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes, tile in itertools.zip_longest(places, tiles, fillvalue=Tile(None, "", "black")):
        _draw(axes, tile)
    figure.savefig(path, dpi=80)


def plot_report(
    accuracies: dict[str, float],
    bins: Sequence[tuple[float, float, int]],
    confused: Sequence[Tile],
    mistakes: Sequence[Tile],
    title: str,
    path: str | Path,
) -> None:
    """Accuracy of each class, reliability, and the tiles of confused classes and of mistakes.

    `bins` are (mean confidence, accuracy, number of images).
    """
    rows = [1.3, *[1] * (-(-len(confused) // COLUMNS) + -(-len(mistakes) // COLUMNS))]
    figure = Figure(figsize=(4 * COLUMNS, 4 * sum(rows)), layout="constrained")
    figure.suptitle(title, fontsize=16)
    grid = figure.add_gridspec(len(rows), COLUMNS, height_ratios=rows)
    _bars(figure.add_subplot(grid[0, : COLUMNS - 1]), accuracies)
    _reliability(figure.add_subplot(grid[0, COLUMNS - 1]), bins)
    for index, tile in enumerate([*confused, *mistakes]):
        _draw(figure.add_subplot(grid[1 + index // COLUMNS, index % COLUMNS]), tile)
    figure.savefig(path, dpi=70)


def _draw(axes, tile: Tile) -> None:
    axes.axis("off")
    axes.set_title(tile.caption, fontsize=11, color=tile.color)
    if tile.image is not None:
        axes.imshow(tile.image)


def _bars(axes, accuracies: dict[str, float]) -> None:
    ordered = sorted(accuracies.items(), key=lambda item: item[1])
    axes.bar(range(len(ordered)), [accuracy for _, accuracy in ordered], color="seagreen")
    size = 9 if len(ordered) <= 40 else 6
    axes.set_xticks(range(len(ordered)), [shorten(name, 24) for name, _ in ordered], rotation=90, fontsize=size)
    axes.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(-0.6, len(ordered) - 0.4))


def _reliability(axes, bins: Sequence[tuple[float, float, int]]) -> None:
    confidences, accuracies, counts = zip(*bins)
    areas = [20 + 400 * count / sum(counts) for count in counts]  # points squared
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":")
    axes.scatter(confidences, accuracies, s=areas, color="seagreen")
    axes.set(xlabel="confidence (area: images)", ylabel="accuracy", xlim=(-0.02, 1.05), ylim=(-0.02, 1.05))


def _curve(axes, lines: Sequence[dict], key: str, **style) -> None:
    axes.plot([line["step"] for line in lines], [line[key] for line in lines], **style)


def shorten(text: str, length: int = 32) -> str:
    """On one line, and cut to a length that fits above an image."""
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text if len(text) <= length else text[: length - 3] + "..."

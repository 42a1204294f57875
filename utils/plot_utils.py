"""Pictures of a run, drawn without a display."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

COLUMNS = 4  # of a grid of images


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


def plot_answers(
    images: Sequence[Image.Image],
    predictions: Sequence[str],
    truths: Sequence[str],
    correct: Sequence[bool],
    path: str | Path,
) -> None:
    """Images with the predicted class above each: green where correct, else red with the true class below it."""
    rows = -(-len(images) // COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 3.4 * rows), layout="constrained")
    for axes in figure.subplots(rows, COLUMNS, squeeze=False).flat:
        axes.axis("off")
    for axes, image, prediction, truth, is_correct in zip(figure.axes, images, predictions, truths, correct):
        axes.imshow(image)
        title = truth if is_correct else f"{_shorten(prediction)}\nis: {truth}"
        axes.set_title(title, color="darkgreen" if is_correct else "darkred", fontsize=11)
    figure.savefig(path, dpi=80)


def plot_report(
    accuracies: dict[str, float],
    bins: Sequence[tuple[float, float, int]],
    confused: Sequence[tuple[str, str, int, Image.Image | None, Image.Image | None]],
    mistakes: Sequence[tuple[Image.Image, str, Sequence[tuple[str, float]]]],
    title: str,
    path: str | Path,
) -> None:
    """Accuracy of each class, reliability, an image of each class of confused pairs, and mistakes.

    `bins` are (mean confidence, accuracy, number of images); `confused` are (class, class, times confused, image of the
    first, image of the second); `mistakes` are (image, true class, [(class, probability), ...], the likeliest first).
    """
    rows = [1.3, *[1] * (-(-2 * len(confused) // COLUMNS) + -(-len(mistakes) // COLUMNS))]
    figure = Figure(figsize=(4 * COLUMNS, 4 * sum(rows)), layout="constrained")
    figure.suptitle(title, fontsize=16)
    grid = figure.add_gridspec(len(rows), COLUMNS, height_ratios=rows)
    _bars(figure.add_subplot(grid[0, : COLUMNS - 1]), accuracies)
    _reliability(figure.add_subplot(grid[0, COLUMNS - 1]), bins)
    tiles: list[tuple[Image.Image | None, str, str]] = []
    for first, second, count, *images in confused:
        tiles.append((images[0], f"{_shorten(first)}\nconfused with the next: {count}", "black"))
        tiles.append((images[1], f"{_shorten(second)}\n", "black"))
    for image, truth, likeliest in mistakes:
        predictions = "\n".join(f"{_shorten(name)} {probability:.0%}" for name, probability in likeliest)
        tiles.append((image, f"is: {_shorten(truth)}\n{predictions}", "darkred"))
    for index, (tile, caption, color) in enumerate(tiles):
        axes = figure.add_subplot(grid[1 + index // COLUMNS, index % COLUMNS])
        axes.axis("off")
        axes.set_title(caption, fontsize=11, color=color)
        if tile is not None:
            axes.imshow(tile)
    figure.savefig(path, dpi=70)


def _bars(axes, accuracies: dict[str, float]) -> None:
    ordered = sorted(accuracies.items(), key=lambda item: item[1])
    axes.bar(range(len(ordered)), [accuracy for _, accuracy in ordered], color="seagreen")
    size = 9 if len(ordered) <= 40 else 6
    axes.set_xticks(range(len(ordered)), [_shorten(name, 24) for name, _ in ordered], rotation=90, fontsize=size)
    axes.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(-0.6, len(ordered) - 0.4))


def _reliability(axes, bins: Sequence[tuple[float, float, int]]) -> None:
    confidences, accuracies, counts = zip(*bins)
    areas = [20 + 400 * count / sum(counts) for count in counts]  # points squared
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":")
    axes.scatter(confidences, accuracies, s=areas, color="seagreen")
    axes.set(xlabel="confidence (area: images)", ylabel="accuracy", xlim=(-0.02, 1.05), ylim=(-0.02, 1.05))


def _curve(axes, lines: Sequence[dict], key: str, **style) -> None:
    axes.plot([line["step"] for line in lines], [line[key] for line in lines], **style)


def _shorten(text: str, length: int = 32) -> str:
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text if len(text) <= length else text[: length - 3] + "..."

"""Pictures of a run, drawn without a display."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image


def plot_training(metrics: Sequence[dict], path: str | Path) -> None:
    """Loss, top-1 on val, learning rate and gradient norm over optimizer steps, from the lines of metrics.jsonl."""
    steps = [line for line in metrics if "loss" in line]
    evaluations = [line for line in metrics if "eval_loss" in line]
    figure = Figure(figsize=(8, 12 if evaluations else 9))
    figure.subplots_adjust(left=0.13, right=0.97, top=0.98, bottom=0.06, hspace=0.06)
    loss, *more, rate, norm = figure.subplots(4 if evaluations else 3, 1, sharex=True)
    _curve(loss, steps, "loss", "train")
    if evaluations:
        _curve(loss, evaluations, "eval_loss", "val", marker="o")
        (top1,) = more
        _curve(top1, evaluations, "eval_top1", "val", marker="o", color="C1")
        top1.set(ylabel="top-1 on val", ylim=(0, 1.02))
    loss.set(ylabel="loss, nats per token")
    loss.legend()
    _curve(rate, steps, "learning_rate", "learning rate")
    rate.set(ylabel="learning rate")
    _curve(norm, steps, "grad_norm", "gradient norm")
    norm.set(ylabel="gradient norm before clipping", xlabel="optimizer step", yscale="log")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def plot_answers(
    images: Sequence[Image.Image],
    answers: Sequence[str],
    truths: Sequence[str],
    right: Sequence[bool],
    path: str | Path,
) -> None:
    """Images with the model's answer over each: green where it is right, else red with the truth below it."""
    columns = 4
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(3 * columns, 3.4 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, answer, truth, is_right in zip(figure.axes, images, answers, truths, right):
        axes.imshow(image)
        axes.set_title(
            truth if is_right else f"{_shorten(answer)}\nis: {truth}",
            color="darkgreen" if is_right else "darkred",
            fontsize=11,
        )
    figure.savefig(path, dpi=80)


def plot_report(
    shares: dict[str, float],
    bins: Sequence[tuple[float, float, int]],
    pairs: Sequence[tuple[str, str, int, Image.Image | None, Image.Image | None]],
    mistakes: Sequence[tuple[Image.Image, str, Sequence[tuple[str, float]]]],
    title: str,
    path: str | Path,
) -> None:
    """Each class's share right, reliability, look-alikes with an image of each, and mistakes with the likeliest names.

    `bins` are (mean confidence, share right, images); a pair is (name, name, times confused, image, image); a mistake
    is (image, truth, [(name, probability), ...]).
    """
    columns = 4
    rows = [1.3, *[1] * (-(-2 * len(pairs) // columns) + -(-len(mistakes) // columns))]
    figure = Figure(figsize=(4 * columns, 4 * sum(rows)), layout="constrained")
    figure.suptitle(title, fontsize=16)
    grid = figure.add_gridspec(len(rows), columns, height_ratios=rows)
    _bars(figure.add_subplot(grid[0, : columns - 1]), shares)
    _reliability(figure.add_subplot(grid[0, columns - 1]), bins)
    tiles: list[tuple[Image.Image | None, str, str]] = []
    for one, other, count, *images in pairs:
        tiles.append((images[0], f"{_shorten(one)}\nconfused with the next: {count}", "black"))
        tiles.append((images[1], f"{_shorten(other)}\n", "black"))
    for image, truth, likeliest in mistakes:
        answers = "\n".join(f"{_shorten(name)} {share:.0%}" for name, share in likeliest)
        tiles.append((image, f"is: {_shorten(truth)}\n{answers}", "darkred"))
    for place, (picture, caption, color) in enumerate(tiles):
        axes = figure.add_subplot(grid[1 + place // columns, place % columns])
        axes.axis("off")
        axes.set_title(caption, fontsize=11, color=color)
        if picture is not None:
            axes.imshow(picture)
    figure.savefig(path, dpi=70)


def _bars(axes, shares: dict[str, float]) -> None:
    ordered = sorted(shares.items(), key=lambda item: item[1])
    axes.bar(range(len(ordered)), [share for _, share in ordered], color="seagreen")
    size = 9 if len(ordered) <= 40 else 6
    axes.set_xticks(range(len(ordered)), [_shorten(name, 24) for name, _ in ordered], rotation=90, fontsize=size)
    axes.set(ylabel="share right", ylim=(0, 1.02), xlim=(-0.6, len(ordered) - 0.4))


def _reliability(axes, bins: Sequence[tuple[float, float, int]]) -> None:
    images = sum(count for *_, count in bins)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.scatter(
        *zip(*[bin[:2] for bin in bins]), s=[20 + 400 * count / images for *_, count in bins], color="seagreen"
    )
    axes.set(xlabel="confidence (area: images)", ylabel="share right", xlim=(-0.02, 1.05), ylim=(-0.02, 1.05))


def _curve(axes, lines: Sequence[dict], key: str, label: str, **style) -> None:
    axes.plot([line["step"] for line in lines], [line[key] for line in lines], label=label, **style)


def _shorten(text: str, length: int = 32) -> str:
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text if len(text) <= length else text[: length - 3] + "..."

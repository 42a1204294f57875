"""Pictures of a run, drawn without a display."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image


def plot_training(metrics: Sequence[dict], path: str | Path) -> None:
    """Loss (train and val), learning rate and gradient norm over optimizer steps, from the lines of metrics.jsonl."""
    steps = [line for line in metrics if "loss" in line]
    evaluations = [line for line in metrics if "eval_loss" in line]
    figure = Figure(figsize=(8, 9))
    figure.subplots_adjust(left=0.13, right=0.97, top=0.98, bottom=0.06, hspace=0.06)
    loss, rate, norm = figure.subplots(3, 1, sharex=True)
    _curve(loss, steps, "loss", "train")
    if evaluations:
        _curve(loss, evaluations, "eval_loss", "val", marker="o")
    loss.set(ylabel="loss, nats per token")
    loss.legend()
    _curve(rate, steps, "learning_rate", "learning rate")
    rate.set(ylabel="learning rate")
    _curve(norm, steps, "grad_norm", "gradient norm")
    norm.set(ylabel="gradient norm before clipping", xlabel="optimizer step", yscale="log")
    for axes in (loss, rate, norm):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def plot_answers(
    photos: Sequence[Image.Image],
    answers: Sequence[str],
    truths: Sequence[str],
    right: Sequence[bool],
    path: str | Path,
) -> None:
    """Photos with the model's answer over each: green where it is right, else red with the truth below it."""
    columns = 4
    rows = -(-len(photos) // columns)
    figure = Figure(figsize=(3 * columns, 3.4 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, photo, answer, truth, is_right in zip(figure.axes, photos, answers, truths, right):
        axes.imshow(photo)
        axes.set_title(
            truth if is_right else f"{_shorten(answer)}\nis: {truth}",
            color="darkgreen" if is_right else "darkred",
            fontsize=11,
        )
    figure.savefig(path, dpi=80)


def _curve(axes, lines: Sequence[dict], key: str, label: str, **style) -> None:
    axes.plot([line["step"] for line in lines], [line[key] for line in lines], label=label, **style)


def _shorten(text: str, length: int = 32) -> str:
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text if len(text) <= length else text[: length - 3] + "..."

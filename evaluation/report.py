"""What a model did on a split, to read: eval_<split>.json, .md, .png and a picture of some images."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.special import softmax

from config.training_config import write_whole
from evaluation.metrics import (
    calibration_bins,
    choose_threshold,
    confidence,
    confusions,
    expected_calibration_error,
    fit_temperature,
    measure_scores,
    measure_selective,
    per_class,
)
from utils.image_utils import open_image
from utils.logging_utils import logger
from utils.plot_utils import plot_answers, plot_report

NEVER_SURE = 0.05  # share of val, the least sure, that is not answered however often it is right
PAIRS, MISTAKES, SHOWN = 4, 12, 12  # look-alikes, mistakes and images in the pictures
EXAMPLES_FOLDER = "examples"  # of a run
EXAMPLES, EXAMPLE_SIDE = 6, 640  # images kept there, and the longer side of each in pixels


class Scored(NamedTuple):
    """Images of a split with the log-probability of every name: scores (n, C) in nats, labels (n,)."""

    ids: list[str]
    labels: np.ndarray
    scores: np.ndarray


class Calibration(NamedTuple):
    """Fitted on val alone; threshold None: no confidence reaches the target precision there."""

    temperature: float
    threshold: float | None
    target_selective_accuracy: float
    images: int


def calibrate(scored: Scored, target_selective_accuracy: float) -> Calibration:
    """Temperature and "not sure" threshold, from val.

    The threshold is what the target precision needs, but never so low that all are answered: pictures without any of
    the classes are told by being less sure than nearly all images of val, and a good model may be right on all of them.
    """
    temperature = fit_temperature(scored.scores, scored.labels)
    correct = scored.scores.argmax(axis=1) == scored.labels
    confidences = confidence(scored.scores, temperature)
    threshold = choose_threshold(confidences, correct, target_selective_accuracy)
    if threshold is not None:
        threshold = max(threshold, float(np.quantile(confidences, NEVER_SURE, method="higher")))
    return Calibration(temperature, threshold, target_selective_accuracy, len(correct))


def compute_metrics(scored: Scored, calibration: Calibration | None, names: Sequence[str]) -> dict:
    """Everything eval_<split>.json says about scores; without a calibration, confidence is as the model gives it."""
    correct = scored.scores.argmax(axis=1) == scored.labels
    plain = confidence(scored.scores, 1.0)
    metrics = dict(measure_scores(scored.scores, scored.labels)) | {
        "ece_uncalibrated": expected_calibration_error(plain, correct)
    }
    if calibration is not None:
        tempered = confidence(scored.scores, calibration.temperature)
        metrics |= {
            "ece": expected_calibration_error(tempered, correct),
            **dict(measure_selective(tempered, correct, calibration.threshold)),
            "calibration": calibration._asdict(),
        }
    else:
        metrics |= {"ece": metrics["ece_uncalibrated"], "coverage": None, "calibration": None}
    pairs = confusions(scored.scores, scored.labels, 20)
    return metrics | {
        "confusions": [{"names": [names[one], names[other]], "confused": count} for one, other, count in pairs],
        "per_class": per_class(scored.scores, scored.labels, names),
    }


def abstention_rate(scores: np.ndarray, calibration: Calibration) -> float:
    """Share of images whose confidence stays below the threshold."""
    sure = dict(
        measure_selective(confidence(scores, calibration.temperature), np.zeros(len(scores)), calibration.threshold)
    )
    return 1 - sure["coverage"]


def write_report(
    report: dict, scored: Scored, calibration: Calibration | None, rows, names: Sequence[str], folder: str | Path
) -> None:
    """eval_<split>.json, .md and .png."""
    stem = Path(folder) / f"eval_{report['split']}"
    write_whole(stem.with_suffix(".json"), json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
    temperature = calibration.temperature if calibration else 1.0
    correct = scored.scores.argmax(axis=1) == scored.labels
    place = {image: index for index, image in enumerate(rows["id"])}

    def image_of(index: int):
        return open_image(rows[place[scored.ids[index]]]["image"])

    confidences = confidence(scored.scores, temperature)
    pairs = []
    for one, other, count in confusions(scored.scores, scored.labels, PAIRS):
        examples = [np.flatnonzero(scored.labels == label)[:1] for label in (one, other)]
        pairs.append((names[one], names[other], count, *[image_of(own[0]) if len(own) else None for own in examples]))
    wrong = np.flatnonzero(~correct)
    mistakes = []
    for index in wrong[np.argsort(-confidences[wrong], kind="stable")][:MISTAKES]:  # most confident first
        shares = softmax(scored.scores[index] / temperature)
        likeliest = [(names[label], float(shares[label])) for label in np.argsort(-shares)[:3]]
        mistakes.append((image_of(index), names[scored.labels[index]], likeliest))
    plot_report(
        {name: own["top1"] for name, own in report["per_class"].items()},
        calibration_bins(confidences, correct),
        pairs,
        mistakes,
        f"{report['split']}: top-1 {report['top1']:.3f} on {report['n']:,} images",
        stem.with_suffix(".png"),
    )
    shown = sorted(random.Random(0).sample(range(len(correct)), min(SHOWN, len(correct))))
    plot_answers(
        [image_of(index) for index in shown],
        [names[scored.scores[index].argmax()] for index in shown],
        [names[scored.labels[index]] for index in shown],
        correct[shown],
        f"{stem}_images.png",
    )
    if report["split"] == "val":
        _keep_examples([(names[scored.labels[index]], image_of(index)) for index in shown[:EXAMPLES]], folder)
    logger.info("result pictures: %s, %s_images.png", stem.with_suffix(".png"), stem)


def _keep_examples(images: Sequence[tuple[str, Image.Image]], folder: str | Path) -> None:
    """examples/<number> <class name>.jpg: held-out images to try the model on, small, without what cameras add."""
    examples = Path(folder) / EXAMPLES_FOLDER
    examples.mkdir(exist_ok=True)
    for old in examples.glob("*.jpg"):
        old.unlink()
    for number, (name, image) in enumerate(images, start=1):
        image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
        image.info.clear()  # EXIF of the camera, its place among it
        plain = "".join(character if character.isalnum() or character in " -'" else "_" for character in name)
        image.save(examples / f"{number} {plain[:60]}.jpg", quality=90)


def result_lines(report: dict) -> Iterator[str]:
    """The report in two or three lines, for the log."""
    low, high = report["top1_interval"]
    yield (
        f"top-1 {report['top1']:.3f} ({low:.3f} to {high:.3f}), top-5 {report['top5']:.3f}, mean per class "
        f"{report['mean_per_class']:.3f} on {report['n']:,} images"
    )
    if report["calibration"] is None:
        yield f"not calibrated: {report['not_calibrated']}"
        return
    right = "" if report["selective_accuracy"] is None else f" ({report['selective_accuracy']:.3f} right)"
    yield (
        f"calibration error {report['ece_uncalibrated']:.3f} before and {report['ece']:.3f} after temperature "
        f'{report["calibration"]["temperature"]:.2f}; {report["coverage"]:.0%} answered{right}, the rest "not sure"'
        + " (fitted on these very images)"
        * (report["split"] == "val")
    )
    if report["ood"]:
        kinds = ", ".join(f"{kind} {own['abstention_rate']:.0%} of {own['n']}" for kind, own in report["ood"].items())
        unsure = 1 - report["coverage"]
        in_vain = [kind for kind, own in report["ood"].items() if own["abstention_rate"] <= unsure < 1]
        doubt = f"; no more than of the classes' own images: {', '.join(in_vain)}; do not rely on it" * bool(in_vain)
        yield f'"not sure" of pictures that show none of the classes: {kinds}{doubt}'


def as_markdown(report: dict) -> str:
    """The report for reading."""

    def show(value) -> str:
        return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    low, high = report["top1_interval"]
    fitted = report["calibration"] and ("these very images" if report["split"] == "val" else "val")
    meanings = {
        "top1": f"share right (95 % interval {low:.3f} to {high:.3f})",
        "top5": "truth among the five likeliest",
        "mean_per_class": "mean of each class's share right",
        "exact_match": "free reply is the name",
        "substring_match": "free reply contains the name (published protocol)",
        "ece": "expected calibration error" + (f", after temperature fitted on {fitted}" if fitted else ""),
        "ece_uncalibrated": "the same without temperature",
        "coverage": 'share answered, the rest is "not sure"',
        "selective_accuracy": "share right among the answered",
        "images_per_s": "speed of scoring",
        "unreadable_images": "images that could not be opened",
    }
    lines = [f"# {report['split']}: {report['n']:,} images, top-1 {report['top1']:.3f}", ""]
    lines += [f'model `{report["model"]}`, adapter `{report["adapter"]}`, question "{report["question"]}"', ""]
    changed = {"per_token": "per token", "prior_calibration": "less their scores on plain grey", "limit": "of a part"}
    if any(report[name] for name in changed):
        lines += [f"Scores {', '.join(words for name, words in changed.items() if report[name])}.", ""]
    lines += ["| figure | value | what |", "|---|---|---|"]
    lines += [f"| {name} | {show(report.get(name))} | {what} |" for name, what in meanings.items()]
    if report["calibration"] is None:
        lines += ["", f"Not calibrated: {report['not_calibrated']}."]
    if report.get("ood"):
        lines += ["", 'Images that show none of the classes, and how many came out "not sure":', ""]
        lines += ["| images | n | not sure |", "|---|---|---|"]
        lines += [f"| {kind} | {own['n']} | {show(own['abstention_rate'])} |" for kind, own in report["ood"].items()]
    lines += confusion_lines(report)
    if report.get("duplicates"):
        lines += ["", f"Byte-identical pictures in two splits, kept as published: {', '.join(report['duplicates'])}."]
    return "\n".join(lines) + "\n"


def confusion_lines(report: dict) -> list[str]:
    """Two tables in Markdown: look-alikes, and each class's share right, worst first."""
    lines = []
    if report["confusions"]:
        lines += ["", "Most often taken for each other:", "", "| one | other | images |", "|---|---|---|"]
        lines += [f"| {' | '.join(pair['names'])} | {pair['confused']} |" for pair in report["confusions"]]
    worst = sorted(report["per_class"].items(), key=lambda item: (item[1]["top1"], item[0]))
    lines += ["", "Classes, worst first:", "", "| class | images | top-1 |", "|---|---|---|"]
    return lines + [f"| {name} | {own['n']} | {own['top1']:.3f} |" for name, own in worst]

"""What a model did on a split, to read: eval_<split>.json, .md, .png and a picture of some images."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from PIL import Image
from scipy.special import softmax

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
from runtime.atomic import write_file
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


def render(template: str, **facts) -> str:
    """A Markdown template of this folder, filled in. What users wrote must pass `text`, `code` or `repr` there."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": escape_markdown, "code": code_span, "number": format_number, "repr": repr}
    return environment.get_template(template).render(**facts)


def escape_markdown(text: str) -> str:
    """On a single line, and without the meaning that Markdown, HTML or a table would give its characters."""
    return re.sub(r"([\\`*_\[\]<>|~$])", r"\\\1", " ".join(text.split()))


def code_span(text: str) -> str:
    """A backtick would end it, so that it becomes an apostrophe."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def format_number(value: float | None, digits: int = 3) -> str:
    """ "-" for None, 1,234 for an integer."""
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def write_report(
    report: dict, scored: Scored, calibration: Calibration | None, rows, names: Sequence[str], folder: str | Path
) -> None:
    """eval_<split>.json, .md and .png."""
    stem = Path(folder) / f"eval_{report['split']}"
    write_file(stem.with_suffix(".json"), json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(render("report.md.j2", report=report), encoding="utf-8")
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

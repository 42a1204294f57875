"""What a model did on a split, to read: eval_<split>.json, .md, .png and a picture of some images."""

import functools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image
from scipy.special import softmax

from evaluation.conformal import explain_missing
from evaluation.metrics import SplitScores, calibration_bins, confidence
from runtime.atomic import write_file
from utils.image_utils import open_image
from utils.logging_utils import logger, skip_failure
from utils.plot_utils import Tile, plot_report, plot_tiles, shorten

PAIRS, MISTAKES, SHOWN = 4, 12, 12  # confused pairs, mistakes and images in the pictures
TILE_SIDE = 320  # pixels; the pictures show each image at up to 280
EXAMPLES_FOLDER = "examples"  # of a run
EXAMPLES, EXAMPLE_SIDE = 6, 640  # images kept there, and the longer side of each in pixels


@functools.cache
def open_templates(folder: Path, is_html: bool = False) -> jinja2.Environment:
    """The templates of a folder; a misspelled variable is an error, and in HTML all text is escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=is_html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **facts) -> str:
    """A Markdown template of this folder, filled in. What users wrote must pass `text`, `code` or `repr` there."""
    templates = open_templates(Path(__file__).parent)
    templates.filters |= {"text": escape_markdown, "code": code_span, "number": format_number, "repr": repr}
    templates.filters |= {"go": escape_go, "interval": format_interval}
    return templates.get_template(template).render(**facts)


def escape_markdown(text: str) -> str:
    """On a single line, and without the meaning that Markdown, HTML or a table would give its characters."""
    return re.sub(r"([\\`*_\[\]<>|~$&])", r"\\\1", " ".join(text.split()))


def code_span(text: str) -> str:
    """A backtick would end it, so that it becomes an apostrophe."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def escape_go(text: str) -> str:
    """For a template of Go in a Modelfile of ollama, between three quotes."""
    return text.replace("{{", '{{ "{{" }}').replace('"""', '{{ "\\"\\"\\"" }}')


def format_number(value: float | None, digits: int = 3) -> str:
    """A dash for None, 1,234 for an integer."""
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def percent(share: float) -> str:
    """Clamped to <1% and >99%: the model is never certain."""
    return "<1%" if share <= 0.005 else ">99%" if share >= 0.995 else f"{share:.0%}"


def format_interval(interval: Sequence[float] | None, digits: int = 3) -> str:
    """Behind a value; nothing for None."""
    if interval is None:
        return ""
    low, high = (format_number(end, digits) for end in interval)
    return f" (95% interval {low} to {high})"


def write_report(report: dict, split: SplitScores, rows, names: Sequence[str], folder: str | Path) -> None:
    """eval_<split>.json, .md, .png and _images.png; of val also a few images in examples/."""
    stem = Path(folder) / f"eval_{report['split']}"
    write_file(stem.with_suffix(".json"), json.dumps(report, indent=2) + "\n")
    with skip_failure(stem.with_suffix(".md")):
        text = render("report.md.j2", report=report, missing_sets=explain_missing(report["calibration"]))
        write_file(stem.with_suffix(".md"), text)
    place = {sample: index for index, sample in enumerate(rows["id"])}

    def image_of(index: int, side: int = TILE_SIDE) -> Image.Image:
        return open_image(rows[place[split.ids[index]]]["image"], side)

    with skip_failure(stem.with_suffix(".png")):
        draw_metrics(report, split, image_of, names, stem.with_suffix(".png"))
    shown = sorted(random.Random(0).sample(range(len(split.ids)), min(SHOWN, len(split.ids))))
    with skip_failure(f"{stem}_images.png"):
        answers = []
        for index in shown:
            predicted, truth = names[split.scores[index].argmax()], names[split.labels[index]]
            caption = shorten(truth) if predicted == truth else f"{shorten(predicted)}\nis: {shorten(truth)}"
            answers.append(Tile(image_of(index), caption, "darkgreen" if predicted == truth else "darkred"))
        plot_tiles(answers, f"{stem}_images.png")
    if report["split"] == "val":
        with skip_failure(Path(folder) / EXAMPLES_FOLDER):
            examples = [(names[split.labels[index]], image_of(index, EXAMPLE_SIDE)) for index in shown[:EXAMPLES]]
            _keep_examples(examples, folder)
    logger.info("saved | %s.md and the pictures %s*.png", stem, stem)


def draw_metrics(
    report: dict, split: SplitScores, image_of: Callable[[int], Image.Image], names: Sequence[str], path: Path
) -> None:
    """Accuracies, reliability, confused classes and mistakes."""
    temperature = report["calibration"]["temperature"] if report["calibration"] else 1.0
    confidences = confidence(split.scores, temperature)
    pairs, mistakes = [], []
    for pair in report["confusions"][:PAIRS]:
        for name, note in zip(pair["names"], (f"confused with the next: {pair['confused']}", "")):
            found = np.flatnonzero(split.labels == names.index(name))
            image = image_of(found[0]) if len(found) else None
            pairs.append(Tile(image, f"{shorten(name)}\n{note}", "black"))
    wrong = np.flatnonzero(~split.correct)
    for index in wrong[np.argsort(-confidences[wrong], kind="stable")][:MISTAKES]:  # most confident first
        probabilities = softmax(split.scores[index] / temperature)
        top = "\n".join(f"{shorten(names[at])} {percent(probabilities[at])}" for at in np.argsort(-probabilities)[:3])
        mistakes.append(Tile(image_of(index), f"is: {shorten(names[split.labels[index]])}\n{top}", "darkred"))
    accuracies = {name: found["top1"] for name, found in report["per_class"].items()}
    title = f"{report['split']}: top-1 {report['top1']:.3f} on {report['n']:,} images"
    bins = calibration_bins(confidences, split.correct)
    plot_report(accuracies, bins, pairs, mistakes, title, path)


def _keep_examples(images: Sequence[tuple[str, Image.Image]], folder: str | Path) -> None:
    """examples/<number> <class name>.jpg: held-out images to try the model on, small, without metadata."""
    examples = Path(folder) / EXAMPLES_FOLDER
    examples.mkdir(exist_ok=True)
    for old in examples.glob("*.jpg"):
        old.unlink()
    for number, (name, image) in enumerate(images, start=1):
        image.info.clear()  # EXIF, which may hold where the image was taken
        plain = "".join(character if character.isalnum() or character in " -'" else "_" for character in name)
        image.save(examples / f"{number} {plain[:60]}.jpg", quality=90)


def result_lines(report: dict) -> Iterator[str]:
    """The report in a few lines, for the log."""
    yield (
        f"top-1 {report['top1']:.3f}{format_interval(report['top1_interval'])} | top-5 {report['top5']:.3f} | "
        f"mean per class {report['mean_per_class']:.3f} | {report['n']:,} images"
    )
    if report["calibration"] is None:
        yield f"not calibrated: {report['not_calibrated']}"
        yield from trust_lines(report)
        return
    yield (
        f"calibration error {report['ece']:.3f}, {report['ece_uncalibrated']:.3f} before temperature scaling | "
        f"coverage {report['coverage']:.0%} | selective accuracy {format_number(report['selective_accuracy'])} | "
        f"fitted on {'these same images' if report['split'] == 'val' else 'val'}"
    )
    sets = report["conformal"]
    if missing := explain_missing(report["calibration"]):
        yield missing
    elif sets and sets["coverage"] is not None:
        yield (
            f"prediction sets ({sets['method'].upper()}, fitted on val) for {sets['target']:g}: coverage "
            f"{sets['coverage']:.3f}{format_interval(sets['coverage_interval'])} | "
            f"{sets['mean_size']:.2f} names on average"
            f"{format_interval(sets['mean_size_interval'], 2)}"
        )
    if (tree := report["hierarchy"]) and tree["rejected"]:
        found = "none is sure either"
        if tree["accepted"]:
            right, precision = f"{tree['correct']:,} a right one ({tree['share_correct']:.0%})", tree["precision"]
            found = f"{tree['accepted']:,} get one, {right} | precision {precision:.3f}"
        yield f'genus or family of {tree["rejected"]:,} images whose class is "not sure": {found}'
    for kind, found in (report["together"] or {}).items():
        yield (
            f"two images of one {kind}: top-1 {found['pair_top1']:.3f} on {found['pairs']:,} pairs, single "
            f"{found['single_top1']:.3f} | coverage {found['coverage']:.0%}, single {found['single_coverage']:.0%}"
        )
    yield from trust_lines(report)
    ood, rejected = report["ood"], 1 - report["coverage"]
    if ood:
        kinds = ", ".join(f"{kind} {found['abstention_rate']:.0%} of {found['n']}" for kind, found in ood.items())
        missed = [kind for kind, found in ood.items() if found["abstention_rate"] <= rejected < 1]
        doubt = f" | do not rely on it: {', '.join(missed)} no more than the split's own images" if missed else ""
        yield f'"not sure" of out-of-distribution images: {kinds}{doubt}'


def trust_lines(report: dict) -> Iterator[str]:
    """Which model to use, and how many images of none of the classes are noticed; what was measured of these."""
    if report["probe"]["linear_top1"] is not None:
        yield report["probe"]["advice"]
    answer = report["none_of_these"]
    if answer["score"]:
        rates = [
            f"{rate:.0%} of {report['split'] if source == 'known' else source}"
            for source, rate in answer["rates"].items()
        ]
        yield (
            f'"none of these" ({answer["score"]}, which keeps {answer["kept"]:.0%} of val): {", ".join(rates)} | '
            f"a name for {answer['coverage']:.0%}, selective accuracy {format_number(answer['selective_accuracy'])}"
        )

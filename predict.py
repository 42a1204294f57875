"""Class names for images, from a run that train.py made.

    python predict.py runs/default photo.jpg              a line: name and confidence, or "not sure"
    python predict.py runs/default images 'more/*.jpg'    folders with all below, and patterns
    python predict.py runs/default images --json          one JSON object per line, as they become known
    python predict.py runs/default --together a.jpg b.jpg    one answer for images of one plant
    python predict.py runs/default --together plants/*    one answer for each folder, with images of one plant
    python predict.py runs/default a.jpg --explain map.png   and a picture of where the model looked for its answer

Names, and why a file could not be classified, go to stdout in the order of the images, all else to stderr. Confidence
and "not sure" are calibrated on val. Exit status 1 if a file could not be classified.
"""

import glob
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config.cli import COMPUTE_FIELDS, parse_run_command
from config.training_config import ConfigError, option
from runtime.run_dir import Run
from utils.logging_utils import UserError, logger, printable, report_errors, set_environment, setup_logging


@dataclass(frozen=True)
class PredictionOptions:
    top: int = option(5, "most likely classes shown for each image", low=1)
    json: bool = option(False, "print one JSON object per line")
    together: bool = option(False, "all images given are of one plant, and those of each folder: an answer for each")
    explain: str | None = option(None, "OUT.png: a picture of where the model looked for its answer to the only image")

    def find_conflicts(self) -> Iterator[str]:
        if self.explain is not None and (problem := find_problem(Path(self.explain))):
            yield f"explain={self.explain}: {problem}; give a new name such as map.png"


def main(argv: list[str] | None = None) -> int:
    run, words, options = parse_run_command(argv, __doc__, PredictionOptions, COMPUTE_FIELDS, Run.load, "IMAGE ...")
    set_environment()
    setup_logging(stream=sys.stderr)
    with report_errors(ConfigError, when_interrupted="the images above are classified"):
        from evaluation.predictor import to_json

        plants = group_images(words, options.together)
        images = sum(len(plant) for _, plant in plants)
        if options.explain and images != 1:
            raise UserError(f"--explain {options.explain}: is of one image, and these are {images:,}; name one")
        failed = 0
        # classify comes first, so that zip lets it draw its picture after the last answer.
        for found, (label, plant) in zip(classify(run, [plant for _, plant in plants], options), plants):
            failed += len(plant if isinstance(found, str) else found.unreadable)
            names = list(plant) if options.together else label
            line = to_json(names, found, options.top) if options.json else format_line(label, found, options.top)
            print(json.dumps(line) if options.json else line, flush=True)
        if failed:
            logger.warning(f"{failed:,} of {images:,} could not be classified; their lines say why")
    return 1 if failed else 0


def classify(run: Run, plants: list[dict[str, str | None]], options: PredictionOptions) -> Iterator:
    """Prediction, or why there is none, of each plant, given as its images and why some are none (find_images)."""
    from evaluation.explain import NAMES, explain
    from evaluation.fusion import explain_doubt
    from evaluation.predictor import load_predictor

    readable = [[image for image, reason in plant.items() if reason is None] for plant in plants]
    predictions: Iterator = iter(())
    if any(readable):
        predictor = load_predictor(run)
        if options.together:
            if doubt := explain_doubt(predictor.calibration):
                logger.warning(doubt)
            predictions = (predictor.predict_together(images) for images in readable if images)
        else:
            top = max(options.top, NAMES) if options.explain else options.top
            predictions = predictor.predict([image for images in readable for image in images], top)
    logger.info(f"run | {run.folder} | {sum(map(len, readable)):,} images to classify")
    for plant, images in zip(plants, readable):
        found, reasons = next(predictions) if images else "", list(filter(None, plant.values()))
        if isinstance(found, str):
            found = "; ".join(filter(None, [found, *reasons]))
        elif reasons:
            found = found._replace(unreadable=[*found.unreadable, *reasons])
        yield found
        if options.explain and not isinstance(found, str):
            explain(predictor, images[0], found, Path(options.explain))


def group_images(words: list[str], together: bool) -> list[tuple[str, dict[str, str | None]]]:
    """(label, images) of each plant: of each image, or `together` of the images of each folder, and of all others."""
    paths = list(itertools.chain(*map(expand, words)))
    if not together:
        return [(image, {image: reason}) for path in paths for image, reason in find_images(path).items()]
    plants: dict[str, dict[str, str | None]] = {}
    for path in dict.fromkeys(paths):
        is_folder, found = os.path.isdir(path), find_images(path)
        plants.setdefault(path if is_folder else "", {}).update(found)
        if is_folder and len(below := set(map(os.path.dirname, found))) > 1:
            move = f"if each is a plant: {printable(os.path.join(path, '*'))}"
            logger.warning(f"{printable(path)}: the images of {len(below)} folders count as one plant; {move}")
    return [(path or ", ".join(plant), plant) for path, plant in plants.items()]


def expand(word: str) -> list[str]:
    """A file or folder as named, or the matches of a pattern, as a shell gives them; the word itself if there are none.

    `**` stands for files alone, and follows no links: two that lead back would take it through 2^40 folders.
    """
    path = Path(word)
    if not glob.has_magic(word) or os.path.exists(word):
        return [word]
    if "**" not in path.parts:
        return sorted(glob.glob(word)) or [word]
    # A link to nowhere stays: its line says why there is no name.
    found = itertools.filterfalse(os.path.isdir, Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    shown = [each for each in found if not any(part[0] == "." for part in each.parts if part not in path.parts)]
    return sorted(map(str, shown)) or [word]


def find_images(path: str) -> dict[str, str | None]:
    """A file, or the images in a folder and below, each with None; or the path with why it stands for no image."""
    from data.survey import add_unused, survey

    if not os.path.isdir(path):  # pathlib would raise for a name that is too long
        is_file = os.path.lexists(path) or not glob.has_magic(path)  # whether it can be opened shows later
        problem = f"{printable(path)}: no file matches this pattern; ** stands for folders below folders"
        return {path: None if is_file else problem}
    folder, excluded = survey(Path(path))
    add_unused(folder, excluded)
    if not folder.num_images:
        return {path: f"{printable(path)}: {'; '.join(['holds no images', *excluded.lines()])}"}
    for line in excluded.lines():
        logger.warning(f"{printable(path)}: {line}")
    return dict.fromkeys(folder.list_images())


def find_problem(path: Path) -> str | None:
    """Why no picture can be made there."""
    if path.suffix.lower() != ".png":
        return "is no name of a .png file"
    if os.path.lexists(path):
        return "already exists"
    is_usable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
    return None if is_usable else f"{path.parent} is no folder that can be written to"


def format_line(image: str, found, top: int) -> str:
    """image: name 93% (other 4%, ...), or the reason why there is no name, which begins with the image."""
    from evaluation.predictor import list_names
    from evaluation.report import percent

    if isinstance(found, str):
        return found
    label = printable(image)
    first, *others = [f"{name} {percent(share)}" for name, share in found.likeliest[:top]]
    line = f"{label}: {first}" + (f" ({', '.join(others)})" if others else "")
    if found.is_none_of_these:
        line = f"{label}: none of these (nearest: {', '.join([first, *others])})"
    elif not found.is_confident:
        taxon = found.taxa[found.level] if found.level else None
        doubt = f"not sure which; {found.level} {taxon.name} {percent(taxon.confidence)}" if taxon else "not sure"
        line, names = f"{label}: {doubt} ({', '.join([first, *others])})", found.prediction_set or []
        line += f"; one of: {list_names(names, top)}" if len(names) > 1 else ""
    return "; not used: ".join([line, *found.unreadable])


if __name__ == "__main__":
    sys.exit(main())

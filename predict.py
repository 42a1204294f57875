"""Class names for images, from a run that train.py made.

    python predict.py runs/default photo.jpg              a line: name and confidence, or "not sure"
    python predict.py runs/default images 'more/*.jpg'    folders with all below, and patterns
    python predict.py runs/default images --json          one JSON object per line, as they become known

Names, and why a file could not be classified, go to stdout in the order of the images, all else to stderr. Confidence
and "not sure" are calibrated on val. Exit status 1 if a file could not be classified.
"""

import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from config.cli import COMPUTE_FIELDS, parse_run_command
from config.training_config import ConfigError, option
from runtime.run_dir import Run
from utils.logging_utils import logger, printable, report_errors, set_environment, setup_logging


@dataclass(frozen=True)
class PredictionOptions:
    top: int = option(5, "most likely classes shown for each image", low=1)
    json: bool = option(False, "print one JSON object per line")


def main(argv: list[str] | None = None) -> int:
    run, words, options = parse_run_command(argv, __doc__, PredictionOptions, COMPUTE_FIELDS, Run.load, "IMAGE ...")
    set_environment()
    setup_logging(stream=sys.stderr)
    with report_errors(ConfigError, when_interrupted="the images above are classified"):
        from evaluation.predictor import load_predictor

        images = list(find_images(words))
        readable = [image for image, reason in images if reason is None]
        predictions = load_predictor(run).predict(readable, options.top) if readable else iter(())
        logger.info(f"run | {run.folder} | {len(readable):,} images to classify")
        format_result, failed = format_json if options.json else format_line, 0
        for image, reason in images:
            found = reason or next(predictions)
            failed += isinstance(found, str)
            print(format_result(image, found, options.top), flush=True)
        if failed:
            logger.warning(f"{failed:,} of {len(images):,} could not be classified; their lines say why")
    return 1 if failed else 0


def find_images(words: list[str]) -> Iterator[tuple[str, str | None]]:
    """(file, or a word that stands for none, and why): files as named, images below folders, matches of patterns."""
    from data.survey import add_unused, survey

    for word in words:
        reason = None
        if os.path.isdir(word):  # pathlib would raise for a name that is too long
            folder, excluded = survey(Path(word))
            add_unused(folder, excluded)
            found = list(folder.list_images())
            for line in excluded.lines() if found else ():
                logger.warning(f"{printable(word)}: {line}")
            reason = f"{printable(word)}: {'; '.join(['holds no images', *excluded.lines()])}"
        elif glob.has_magic(word) and not os.path.exists(word):
            found = sorted(path for path in match(word) if not os.path.isdir(path))
            reason = f"{printable(word)}: no file matches this pattern; ** stands for folders below folders"
        else:
            found = [word]  # whether it is there shows when it is opened
        yield from [(path, None) for path in found] or [(word, reason)]


def match(pattern: str) -> Iterable[str]:
    """What a pattern stands for. `**` follows no links: two that lead back would take it through 2^40 folders."""
    path = Path(pattern)
    if "**" not in path.parts:
        return glob.glob(pattern)
    found = Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))
    return (
        str(each) for each in found if not any(part.startswith(".") for part in each.parts if part not in path.parts)
    )


def format_line(image: str, found, top: int) -> str:
    """image: name 93% (other 4%, ...), or the reason why there is no name, which begins with the image."""
    from evaluation.predictor import list_names, percent

    if isinstance(found, str):
        return found
    first, *others = [f"{name} {percent(share)}" for name, share in found.likeliest[:top]]
    if not found.is_confident:
        line, names = f"{printable(image)}: not sure ({', '.join([first, *others])})", found.prediction_set or []
        return f"{line}; one of: {list_names(names, top)}" if len(names) > 1 else line
    return f"{printable(image)}: {first} ({', '.join(others)})" if others else f"{printable(image)}: {first}"


def format_json(image: str, found, top: int) -> str:
    if isinstance(found, str):
        return json.dumps({"image": image, "error": found})
    likeliest = [{"name": name, "confidence": round(share, 6)} for name, share in found.likeliest[:top]]
    name = found.likeliest[0][0] if found.is_confident else None
    line = {"image": image, "name": name, "confidence": likeliest[0]["confidence"], "likeliest": likeliest}
    line |= {} if found.prediction_set is None else {"set": found.prediction_set}
    return json.dumps(line if found.at_most is None else line | {"confidence_at_most": round(found.at_most, 6)})


if __name__ == "__main__":
    sys.exit(main())

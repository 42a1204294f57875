"""Name the plant in images, with a run that train.py made.

    python predict.py runs/default photo.jpg              one line: the name and how sure, or "not sure"
    python predict.py runs/default images 'more/*.jpg'    folders with all below them, and patterns
    python predict.py runs/default images --json          one JSON object a line, as they become known

Names, and why a file could not be named, go to stdout in the order of the images, all else to stderr. Confidence and
"not sure" are as fitted on val. Exit status 1 if a file could not be named.
"""

import glob
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config.cli import COMPUTE_FIELDS, parse_run_command
from config.training_config import ConfigError, option
from runtime.run_dir import Run
from utils.logging_utils import logger, report_errors, set_environment, setup_logging


@dataclass(frozen=True)
class PredictionOptions:
    top: int = option(5, "most likely classes shown for each image", low=1)
    json: bool = option(False, "print one JSON object per line")


def main(argv: list[str] | None = None) -> int:
    run, words, options = parse_run_command(argv, __doc__, PredictionOptions, COMPUTE_FIELDS, Run.load, "IMAGE ...")
    set_environment()
    setup_logging(stream=sys.stderr)
    with report_errors(ConfigError, when_interrupted="what was named stands above"):
        images = list(find_images(words))
        readable = [image for image, reason in images if reason is None]
        named = load_predictor(run).name(readable) if readable else iter(())
        logger.info(f"naming {len(readable):,} images with {run.folder}")
        tell, failed = as_json if options.json else as_line, 0
        for image, reason in images:
            found = reason or next(named)
            failed += isinstance(found, str)
            try:
                print(tell(image, found, options.top), flush=True)
            except BrokenPipeError:  # whoever reads, such as head, has enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
                return 1
        if failed:
            logger.warning(f"{failed:,} of {len(images):,} could not be named; their lines say why")
    return 1 if failed else 0


def load_predictor(run: Run):
    """The evaluation.predictor.Predictor of a run."""
    from evaluation.predictor import build_predictor
    from models.builder import PlantModel
    from runtime.checkpoint import describe_best
    from runtime.device import choose_device

    adapter = None if run.is_base_model else describe_best(run.best_folder)
    device = choose_device(run.config.model, run.config.gpu_memory_fraction)
    plant = PlantModel.from_run(run, device)
    return build_predictor(run.config, plant.model, plant.collator, plant.precision, run.folder, adapter)


def find_images(words: list[str]) -> Iterator[tuple[str, str | None]]:
    """(file, or a word that stands for none, and why): files as named, images below folders, matches of patterns."""
    from utils.image_utils import SUFFIXES, files_below, is_image_name, printable

    for word in words:
        reason = None
        if os.path.isdir(word):  # pathlib would raise for a name that is too long
            files = files_below(Path(word))
            found = [str(file) for file in files if is_image_name(file)]
            others = [str(file) for file in files if not is_image_name(file)]
            if found and others:
                logger.warning(f"{printable(word)}: {len(others):,} files are not read ({printable(others[0])}, ...)")
            reason = f"{printable(word)}: holds no images; files that end in {' '.join(SUFFIXES)} are taken for such"
        elif glob.has_magic(word) and not os.path.exists(word):
            found = sorted(path for path in glob.glob(word, recursive=True) if not os.path.isdir(path))
            reason = f"{printable(word)}: no file matches this pattern; ** stands for folders below folders"
        else:
            found = [word]  # whether it is there shows when it is opened
        yield from [(path, None) for path in found] or [(word, reason)]


def as_line(image: str, found, top: int) -> str:
    """photo: name 93 % (other 4 %, ...), or the reason why there is none, which begins with the image."""
    from evaluation.predictor import percent
    from utils.image_utils import printable

    if isinstance(found, str):
        return found
    told = [f"{name} {percent(share)}" for name, share in found.likeliest[:top]]
    if not found.is_confident:
        return f"{printable(image)}: not sure ({', '.join(told)})"
    return f"{printable(image)}: {told[0]}" + f" ({', '.join(told[1:])})" * (len(told) > 1)


def as_json(image: str, found, top: int) -> str:
    if isinstance(found, str):
        return json.dumps({"image": image, "error": found})
    likeliest = [{"name": name, "confidence": round(share, 6)} for name, share in found.likeliest[:top]]
    name = found.likeliest[0][0] if found.is_confident else None
    return json.dumps({"image": image, "name": name, "confidence": likeliest[0]["confidence"], "likeliest": likeliest})


if __name__ == "__main__":
    sys.exit(main())

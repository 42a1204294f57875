"""Score a run, or the untouched base, on held-out images: how often right, how sure, which plants it takes for which.

    python evaluate.py runs/default --split test           every name's exact log-probability on each image
    python evaluate.py --model ID_OR_FOLDER --split test   the untouched base, with the published question
    python evaluate.py runs/default --protocol both        free replies too, as the published figures were made
    torchrun --nproc-per-node 2 evaluate.py runs/default   shared out over two GPUs
    python evaluate.py runs/base-x runs/default            compare two that were scored, image by image (McNemar)

Writes eval_<split>.json, .md, .png and _images.png into the run folder (of the base: runs/base-<name>). Temperature and
"not sure" threshold are fitted on val alone. The same command again goes on where it was left.
"""

import contextlib
import dataclasses
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config.cli import COMPUTE_FIELDS, DATA_FIELDS, CommandLine, list_runs
from config.training_config import CONFIG_FILE, ConfigError, TrainingConfig, option
from runtime.resume import changed_fields
from runtime.run_dir import Run
from runtime.run_files import BEST, load_config, save_config
from utils.logging_utils import UserError, logger, report_errors, set_environment, setup_logging

LONGEST_REPLY = 64  # tokens, of the published protocol (arXiv 2405.18415)
WORTH_COMPILING = 2000  # images of a split from which compiled kernels win back their compilation (docs/LOG.md)
PUBLISHED_QUESTION = "What type of object is in this photo?"  # of arXiv 2405.18415, asked of a base model
# Options of a run that may differ in its evaluation.
OVERRIDABLE = (*DATA_FIELDS, *COMPUTE_FIELDS, "compile", "streaming")


@dataclass(frozen=True)
class EvaluationOptions:
    split: str = option("val", "held-out images", choices=("val", "test"))
    protocol: str = option(
        "scoring",
        "scoring: log-likelihoods of all class names; generation: open-ended replies",
        choices=("scoring", "generation", "both"),
    )
    limit: int | None = option(None, "images of the split, sampled with a fixed seed; none: all", low=1)
    per_token: bool = option(False, "divide each name's log-likelihood by its number of tokens")
    prior_calibration: bool = option(False, "subtract each name's log-likelihood on a plain gray image")
    target_selective_accuracy: float = option(
        0.95, "accuracy on the images that are not rejected, for which val's threshold is chosen", above=0, high=1
    )
    ood: str | None = option(None, "folder of images of none of the classes: how many are rejected?")


class Evaluation(NamedTuple):
    """A command line of evaluate.py."""

    folders: list[Path]  # none: the base model; one: a run; two: compare their scores
    config: TrainingConfig
    recorded: dict  # by the run; empty for the base model
    options: EvaluationOptions


def parse_evaluation(argv: list[str] | None = None) -> Evaluation:
    """No run (a base model), one, or two, with flags over the run's saved config."""
    line = CommandLine(argv, __doc__, EvaluationOptions, "[RUN ...]")
    run = Run(TrainingConfig(question=PUBLISHED_QUESTION))
    for folder in line.words:
        run = line.load_run(folder, Run.load) or run
    if len(line.words) > 2:
        line.problems.append(f"{' '.join(line.words)}: pass one run, or two to compare")
    elif not line.words and not {"model", "preset"} & set(line.given):
        line.problems.append(
            f"RUN is missing; or evaluate a base model: --model ID_OR_FOLDER. Runs here: {list_runs()}"
        )
    if line.words:
        names = [field.name for field in (*dataclasses.fields(EvaluationOptions), *dataclasses.fields(TrainingConfig))]
        own = [field.name for field in dataclasses.fields(EvaluationOptions)]
        allowed = {"split"} if len(line.words) == 2 else {*own, *OVERRIDABLE}
        reason = "has no effect when runs are compared" if len(line.words) == 2 else "is fixed by the run"
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(allowed))
        line.refuse({name: f"{reason}; options here: {flags}" for name in names if name not in allowed})
    options, config = line.apply(EvaluationOptions()), line.apply(run.config)
    if not line.words and not line.problems:
        line.problems += _find_other_base(config)
    line.exit_on_problems()
    return Evaluation([Path(word) for word in line.words], config, run.recorded, options)


def base_folder(config: TrainingConfig) -> Path:
    """Where the scores of a base model are written."""
    return Path(config.output_dir or f"runs/base-{Path(config.model).name}")


def _find_other_base(config: TrainingConfig) -> list[str]:
    """Why the folder of this base model cannot be used: it holds a run, or another base model or data set."""
    folder = base_folder(config)
    if not (folder / CONFIG_FILE).exists():
        return []
    try:
        saved, recorded = load_config(folder)
    except ConfigError as error:
        return [str(error)]
    changed = changed_fields(config, saved) if recorded.get("base") else ["a run"]
    return [f"{folder}: holds {'; '.join(changed)}; use another --output-dir"] if changed else []


def main(argv: list[str] | None = None) -> int:
    folders, config, recorded, options = parse_evaluation(argv)
    set_environment()
    is_base = not folders or bool(recorded.get("base"))
    folder = folders[0] if folders else base_folder(config)
    with report_errors(ConfigError), contextlib.ExitStack() as held:
        setup_logging(None if len(folders) == 2 else folder, "evaluate.log")
        if len(folders) == 2:
            compare_runs(*folders, options.split)
            return 0
        from peft import PeftModel

        from data.dataset import build_datasets, known_duplicates, take
        from data.labels import parse_reply
        from evaluation.evaluator import build_evaluator
        from evaluation.model_card import build_model_card
        from models.builder import PlantModel
        from runtime.checkpoint import CARD, describe_best
        from runtime.distributed import assert_same_across_ranks, init_distributed

        # Weights are whole on every rank here, so a run that was sharded is scored by one rank too.
        dist = held.enter_context(init_distributed(dataclasses.replace(config, sharding="none")))
        device = dist.device
        assert_same_across_ranks({"run": f"{folder}"} | dataclasses.asdict(options), dist)
        with dist.main_process_first():
            adapter = None if is_base else describe_best(folder / BEST)
            data = build_datasets(config)
            if not is_base:
                is_own = config.dataset == load_config(folder)[0].dataset
                fingerprint = recorded["data_fingerprint"] if is_own else None
                data.assert_matches(recorded["class_names"], fingerprint, folder)
        assert_same_across_ranks({"images": data.fingerprint()}, dist)
        ood = collect_ood_images(options.ood)
        if is_base:
            plant = PlantModel.from_config(config, data.class_names, device)
            if dist.is_main_process:
                save_config(config, folder, plant.facts() | {"class_names": data.class_names, "base": True})
        else:
            plant = PlantModel.from_run(Run(config, recorded), device)
        model, collator, precision = plant.model, plant.collator, plant.precision
        validation = None if data.validation is None else take(data.validation, options.limit)
        rows = validation if options.split == "val" else take(data.test, options.limit)
        if rows is None:
            raise UserError(f"{folder}: learned from val, which measures nothing then; use --split test")
        logger.info(
            f"run    {folder}: {'the untouched ' if is_base else ''}{config.model}{f', {adapter}' if adapter else ''}"
        )
        logger.info(f"data   {data.source}: {len(rows):,} images of {options.split}, {len(data.class_names)} classes")
        if not dist.is_main_process:
            logger.setLevel(logging.WARNING)  # what it meets from here on is its own, such as bad images
        worth = len(rows) / dist.world_size >= WORTH_COMPILING
        if config.compile == "auto" and device.type == "cuda" and worth:
            plant.compile()
        with model.disable_adapter() if is_base and isinstance(model, PeftModel) else contextlib.nullcontext():
            evaluator = build_evaluator(
                *(config, model, collator, precision, folder, adapter, dist),
                per_token=options.per_token,
                prior_calibration=options.prior_calibration,
                limit=options.limit,
                target_selective_accuracy=options.target_selective_accuracy,
            )
            if options.protocol != "scoring":
                evaluator.measure_replies(rows, options.split, parse_reply, LONGEST_REPLY)
            if options.protocol != "generation":
                evaluator.report(
                    rows,
                    options.split,
                    None if validation is None else evaluator.calibrate(validation),
                    why_not_calibrated="the run learned from val" if validation is None else None,
                    ood=ood,
                    duplicates=known_duplicates(rows["id"]),
                )
                if not is_base and dist.is_main_process:
                    run = Run.load(folder)
                    card = build_model_card(run.config, run.recorded, folder, plant.prompt)
                    (folder / BEST / CARD).write_text(card, encoding="utf-8")
    return 0


def collect_ood_images(folder: str | None) -> dict[str, list[dict]]:
    """Pictures without any of the classes: drawn ones, and the images of a folder."""
    from data.sources import load_ood_images
    from data.synthetic import draw_ood_images

    return draw_ood_images() | ({} if folder is None else {"your images": load_ood_images(Path(folder))})


def compare_runs(first: Path, second: Path, split: str) -> None:
    """McNemar's exact test on the images that both were scored on."""
    from evaluation.evaluator import read_correct
    from evaluation.metrics import compare

    (one, first_correct), (other, second_correct) = (read_correct(folder, split) for folder in (first, second))
    if (one["dataset"], one["question"]) != (other["dataset"], other["question"]):
        logger.warning(
            f"compared are two data sets or questions: {one['dataset']}, {one['question']!r} and {other['dataset']}, "
            f"{other['question']!r}"
        )
    both = sorted(set(first_correct) & set(second_correct))
    if not both:
        raise UserError(
            f"{first} and {second}: no image of {split} was scored by both; score them on the same data set"
        )
    found = dict(compare([first_correct[image] for image in both], [second_correct[image] for image in both]))
    logger.info(
        f"result {split}, {found['n']:,} images: {first} {found['first']:.3f}, {second} {found['second']:.3f}; "
        f"right in the first alone {found['only_first']}, in the second alone {found['only_second']}; "
        f"p = {found['p']:.2g} (McNemar, exact)"
    )


if __name__ == "__main__":
    sys.exit(main())

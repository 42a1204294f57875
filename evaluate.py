"""Evaluate a run, or a base model (zero-shot), on held-out images: accuracy, calibration, confusions.

    python evaluate.py runs/default --split test           log-probability of every class name on each image
    python evaluate.py --model ID_OR_FOLDER --split test   a base model, with the published question
    python evaluate.py runs/default --protocol both        generated replies too, as the published metrics were made
    torchrun --nproc-per-node 2 evaluate.py runs/default   distributed across two GPUs
    python evaluate.py runs/base-x runs/default            compare two runs that were evaluated (McNemar's test)
    python evaluate.py runs/default --holdout-classes 10   trains it five times anew, each without ten classes

Writes eval_<split>.json, .md and pictures to the run directory (of a base model: runs/base-<name>); with --csv tables
for spreadsheets too.
Temperature and "not sure" threshold are fitted on val alone. The same command resumes an interrupted evaluation.
"""

import logging
import sys
from dataclasses import asdict, replace
from pathlib import Path

from config.cli import COMPUTE_FIELDS, DATA_FIELDS, CommandLine, EvaluationOptions, list_runs
from config.training_config import CONFIG_FILE, ConfigError, TrainingConfig
from runtime.run_dir import Run, changed_fields
from runtime.run_files import save_config
from utils.logging_utils import UserError, logger, report_errors, set_environment, setup_logging

MAX_NEW_TOKENS = 64  # of a reply in the published protocol (arXiv 2405.18415)
PUBLISHED_QUESTION = "What type of object is in this photo?"  # of arXiv 2405.18415, asked of a base model
# Options of a run that may differ in its evaluation.
OVERRIDABLE = (*DATA_FIELDS, *COMPUTE_FIELDS, "compile", "streaming", "holdout_classes")


def main(argv: list[str] | None = None) -> int:
    run, other, options = parse_evaluation(argv)
    set_environment()
    with report_errors(ConfigError):
        setup_logging(None if other else run.folder, "evaluate.log")
        if other:
            compare_runs(run, other, options.split)
        elif count := find_holdout(run, options.protocol):
            from evaluation.holdout import evaluate_holdouts

            trained = replace(run, config=replace(run.config, holdout_classes=0))
            evaluate_holdouts(trained, count, options.split, lambda each: evaluate_run(each, options))
        else:
            evaluate_run(run, options)
    return 0


def find_holdout(run: Run, protocol: str) -> int:
    """The number of classes to train again without; 0 of a base model, or of a run that was trained without them."""
    saved = run.config if run.is_base_model else Run.load(run.folder).config
    if run.config.holdout_classes != saved.holdout_classes > 0:
        problem = f"was trained without {saved.holdout_classes} classes already"
        raise UserError(f"{run.folder}: {problem}; evaluate it without --holdout-classes, or give a run of all classes")
    count = run.config.holdout_classes - saved.holdout_classes
    if count and protocol == "generation":
        raise UserError("--holdout-classes with --protocol generation: replies have no scores; use scoring or both")
    if count and saved.train_on_val:
        problem = "was trained on val, and what tells other plants is fitted there"
        raise UserError(f"{run.folder}: {problem}; give --holdout-classes a run with train_on_val=false")
    return count


def evaluate_run(run: Run, options: EvaluationOptions) -> None:
    """Score a split, generate replies to its images, or both; write the reports. Raises UserError."""
    from data.dataset import build_datasets, take
    from data.sources import load_ood_images
    from evaluation.evaluator import build_evaluator
    from evaluation.model_card import write_model_card
    from evaluation.results import same_weights
    from evaluation.verify import check_same_data
    from models.builder import PlantModel
    from models.memory import is_worth_compiling
    from runtime.distributed import assert_same_across_ranks, init_distributed

    run = replace(run, config=replace(run.config, sharding="none"))  # every rank has all weights here
    with init_distributed(run.config) as dist:
        assert_same_across_ranks({"run": f"{run.folder}"} | asdict(options), dist)
        with dist.main_process_first():
            data = build_datasets(run.data_config)
            if not run.is_base_model:
                run.config = replace(run.config, dataset=check_same_data(data, run))
        assert_same_across_ranks({"images": data.fingerprint()}, dist)
        validation = None if data.validation is None else take(data.validation, options.limit)
        rows = validation if options.split == "val" else take(data.test, options.limit)
        if rows is None:
            raise UserError(f"{run.folder}: was trained on val, which measures nothing then; use --split test")
        ood_rows = load_ood_images(Path(options.ood), data.class_names) if options.ood else None
        if run.is_base_model:
            run.recorded = {"base": True, "class_names": data.class_names}
        run.recorded["taxonomy"] = data.taxonomy
        with same_weights(run):
            plant = PlantModel.from_run(run, dist.device)
        if run.is_base_model and dist.is_main_process:
            save_config(run.config, run.folder, plant.facts() | run.recorded)
        if dist.device.type == "cuda" and is_worth_compiling(run.config.compile, len(rows) / dist.world_size):
            plant.compile()
        logger.info(f"run | {run.folder} | {run.config.model}")
        logger.info(f"data | {data.source} | {len(rows):,} images of {options.split} | {len(data.class_names)} classes")
        if not dist.is_main_process:
            logger.setLevel(logging.WARNING)  # of what concerns this rank alone, such as an OOM
        evaluator = build_evaluator(run, plant, dist, options)
        if options.protocol != "scoring":
            evaluator.generate_report(rows, options.split, MAX_NEW_TOKENS)
        if options.protocol != "generation":
            evaluator.report(rows, options.split, validation, ood_rows, data)
            if dist.is_main_process and not run.is_base_model:
                write_model_card(run, plant.prompt)


def compare_runs(first: Run, second: Run, split: str) -> None:
    """McNemar's exact test on the images that both were scored on."""
    from evaluation.metrics import mcnemar
    from evaluation.results import read_correct

    (facts, correct), (other_facts, other_correct) = (read_correct(run, split) for run in (first, second))
    for name in ("dataset", "question"):
        values = facts.get(name), other_facts.get(name)
        if values[0] != values[1]:
            logger.warning(f"the runs differ in {name}: {values[0]!r} and {values[1]!r}")
    both = sorted(set(correct) & set(other_correct))
    if not both:
        raise UserError(f"{first.folder}, {second.folder}: no image of {split} was scored by both; use one data set")
    found = mcnemar([correct[sample] for sample in both], [other_correct[sample] for sample in both])
    logger.info(
        f"result | {split} | {found['n']:,} images | {first.folder} {found['first']:.3f} | {second.folder} "
        f"{found['second']:.3f} | correct only in the first {found['only_first']}, only in the second "
        f"{found['only_second']} | p = {found['p']:.2g} (McNemar's exact test)"
    )


# ---- the command line


def parse_evaluation(argv: list[str] | None = None) -> tuple[Run, Run | None, EvaluationOptions]:
    """(a run, or a base model's with the directory for its scores; another to compare it with; options)."""
    line = CommandLine(argv, __doc__, EvaluationOptions, "[RUN ...]")
    runs = [line.load_run(folder, Run.load) for folder in line.words]
    if len(line.words) > 2:
        line.problems.append(f"{' '.join(line.words)}: pass one run, or two to compare")
    elif not line.words and not {"model", "preset"} & set(line.given):
        line.problems.append(
            f"RUN is missing; or evaluate a base model: --model ID_OR_FOLDER. Runs here: {list_runs()}"
        )
    if line.words:
        allowed, reason = {*vars(EvaluationOptions()), *OVERRIDABLE}, "is fixed by the run"
        if len(line.words) == 2:
            allowed, reason = {"split"}, "has no effect when runs are compared"
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(allowed))
        line.refuse({name: f"{reason}; options here: {flags}" for name in line.given if name not in allowed})
    run = next(filter(None, runs), None) or Run(TrainingConfig(question=PUBLISHED_QUESTION), {"base": True})
    options, config = line.apply(EvaluationOptions()), line.apply(run.config)
    run = replace(run, config=config)
    if not line.words:
        run.config = replace(config, output_dir=config.output_dir or f"runs/base-{Path(config.model).name}")
        is_used = not line.problems and (run.folder / CONFIG_FILE).exists()
        if is_used and (saved := line.load_run(str(run.folder), Run.load)):
            changed = changed_fields(run.config, saved.config) if saved.is_base_model else ["a run"]
            line.problems += [f"{run.folder}: holds {'; '.join(changed)}; use another --output-dir"] if changed else []
    line.exit_on_problems()
    return run, runs[1] if len(runs) == 2 else None, options


if __name__ == "__main__":
    sys.exit(main())

"""What evaluate.py can be told beside the settings of the run. Standard library only."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config.training_config import (
    CONFIG_FILE,
    ConfigError,
    TrainingConfig,
    apply_flags,
    find_problems,
    find_range_problems,
    load_config,
    option,
    read_flags,
)
from runtime.run_dir import changed_fields, open_run, runs_here

PUBLISHED_QUESTION = "What type of object is in this photo?"  # of arXiv 2405.18415; the untouched base is asked it
# What a run may be evaluated with otherwise than it was trained with; the rest is the run's own.
FREE_FIELDS = (
    *("dataset", "dataset_revision", "allow_missing", "max_unreadable_fraction", "num_workers"),
    *("per_device_eval_batch_size", "gpu_memory_fraction", "mixed_precision", "load_in_4bit", "compile", "streaming"),
)


@dataclass(frozen=True)
class EvaluationOptions:
    split: str = option("val", "images that were held out", choices=("val", "test"))
    protocol: str = option(
        "scoring", "scoring: every name exactly; generation: free replies", choices=("scoring", "generation", "both")
    )
    limit: int | None = option(None, "images of the split, drawn with a fixed seed; none: all", low=1)
    per_token: bool = option(False, "divide each name's log-probability by its number of tokens")
    prior_calibration: bool = option(False, "subtract each name's log-probability under a plain grey image")
    target_selective_accuracy: float = option(
        0.95, "share right among the answered that the not-sure threshold is chosen for, on val", above=0, high=1
    )
    ood: str | None = option(None, "folder of images that show none of the classes; how many come out not sure?")


class Evaluation(NamedTuple):
    """A command line of evaluate.py."""

    folders: list[Path]  # none: the base; one: a run; two: compare what was scored
    config: TrainingConfig
    recorded: dict  # by the run; empty for the base
    options: EvaluationOptions


def parse_evaluation(argv: list[str] | None = None, description: str = "") -> Evaluation:
    """Flags over the run's saved config. Every problem is printed at once; then SystemExit with status 2."""
    flags = read_flags(argv, description, (TrainingConfig, EvaluationOptions), words="[RUN ...]")
    options, problems = apply_flags(EvaluationOptions(), flags.given)
    problems = [*flags.problems, *problems, *find_range_problems(options)]
    folders = [Path(word) for word in flags.words]
    config, recorded = TrainingConfig(question=PUBLISHED_QUESTION), {}
    if not folders and "model" not in flags.given and "preset" not in flags.given:
        problems.append(f"name a run ({runs_here()}), or the untouched base: --model ID_OR_FOLDER")
    if len(folders) > 2:
        problems.append(f"{' '.join(flags.words)}: name one run, or two to compare")
    for folder in folders:
        try:
            config, recorded = open_run(folder)
        except ConfigError as error:
            problems.append(f"{error}. Runs here: {runs_here()}")
    allowed = set(flags.given)
    if folders:
        allowed = {field.name for field in dataclasses.fields(EvaluationOptions)} | set(FREE_FIELDS)
        if len(folders) == 2:
            allowed = {"split"}
        told = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(allowed))
        problems += [
            f"--{name.replace('_', '-')}: is the run's own here; beside {' '.join(flags.words)} may stand {told}"
            for name in sorted(set(flags.given) - allowed)
        ]
    config, more = apply_flags(config, {name: text for name, text in flags.given.items() if name in allowed})
    problems += [*more, *find_problems(config)]
    if not folders and not problems:
        problems += _other_base(config)
    flags.stop_on(problems)
    return Evaluation(folders, config, recorded, options)


def base_folder(config: TrainingConfig) -> Path:
    """Where the scores of an untouched base go."""
    return Path(config.output_dir or f"runs/base-{Path(config.model).name}")


def _other_base(config: TrainingConfig) -> list[str]:
    """Why the folder of this base is not free for it: it holds a run, or another base or data set."""
    folder = base_folder(config)
    if not (folder / CONFIG_FILE).exists():
        return []
    try:
        saved, recorded = load_config(folder)
    except ConfigError as error:
        return [str(error)]
    changed = changed_fields(config, saved) if recorded.get("base") else ["a run"]
    return [f"{folder}: holds {'; '.join(changed)}; name another --output-dir"] if changed else []

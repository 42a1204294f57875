"""What benchmark.py can be told beside the settings of a run. Standard library only."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from config.training_config import TrainingConfig, apply_flags, find_problems, find_range_problems, option, read_flags

# Settings of a run that change nothing here, since images are made and nothing is kept; the reason, and what to use.
OF_DATA = (
    *("dataset", "dataset_revision", "train_on_val", "sample_fraction", "val_fraction", "test_fraction"),
    *("allow_missing", "max_unreadable_fraction"),
)
OF_LENGTH = (
    *("output_dir", "num_train_epochs", "max_steps", "eval_steps", "early_stopping_patience"),
    *("early_stopping_min_gain", "save_steps", "save_total_limit", "report_to"),
    *("resume", "allow_changed", "max_skipped_steps"),
)
WITHOUT_EFFECT = dict.fromkeys(OF_DATA, "images are made here: --image WIDTHxHEIGHT") | dict.fromkeys(
    OF_LENGTH, "a benchmark runs --steps optimizer steps and keeps nothing"
)


@dataclass(frozen=True)
class BenchmarkOptions:
    steps: int = option(6, "optimizer steps that are timed, after two that are not", low=2)
    image: str = option("500x667", "width x height of the made images, before image_size")
    scoring: bool = option(True, "score all class names too, per_device_eval_batch_size images at a time")
    against: str = option("none", "stock: the plain Trainer and PEFT after it", choices=("none", "stock"))


class Benchmark(NamedTuple):
    """A command line of benchmark.py."""

    config: TrainingConfig
    options: BenchmarkOptions
    image: tuple[int, int]  # (W, H)


def parse_benchmark(argv: list[str] | None = None, description: str = "") -> Benchmark:
    """Every problem is printed at once; then SystemExit with status 2."""
    flags = read_flags(argv, description, (TrainingConfig, BenchmarkOptions))
    options, problems = apply_flags(BenchmarkOptions(), flags.given)
    config, more = apply_flags(TrainingConfig(), flags.given)
    problems = [*flags.problems, *problems, *more, *find_range_problems(options), *find_problems(config)]
    problems += [
        f"{name}={flags.given[name]}: has no effect, {why}"
        for name, why in WITHOUT_EFFECT.items()
        if name in flags.given
    ]
    size = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", options.image)
    if not size:
        problems.append(f"photo={options.image}: width x height of 1 to 9999 pixels is needed, such as 500x667")
    flags.stop_on(problems)
    return Benchmark(config, options, (int(size[1]), int(size[2])))

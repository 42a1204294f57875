"""What benchmark.py can be told beside the settings of a run. Standard library only."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from config.training_config import TrainingConfig, apply_flags, find_problems, find_range_problems, knob, read_flags


@dataclass(frozen=True)
class BenchmarkOptions:
    steps: int = knob(6, "optimizer steps that are timed, after two that are not", low=2)
    photo: str = knob("500x667", "width x height of the made photos, before image_size")
    scoring: bool = knob(True, "score all class names too, per_device_eval_batch_size photos at a time")
    against: str = knob("none", "stock: the plain Trainer and PEFT after it", choices=("none", "stock"))


class Benchmark(NamedTuple):
    """A command line of benchmark.py."""

    config: TrainingConfig
    options: BenchmarkOptions
    photo: tuple[int, int]  # (W, H)


def parse_benchmark(argv: list[str] | None = None, description: str = "") -> Benchmark:
    """Every problem is printed at once; then SystemExit with status 2."""
    flags = read_flags(argv, description, (TrainingConfig, BenchmarkOptions))
    options, problems = apply_flags(BenchmarkOptions(), flags.given)
    config, more = apply_flags(TrainingConfig(), flags.given)
    problems = [*flags.problems, *problems, *more, *find_range_problems(options), *find_problems(config)]
    size = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", options.photo)
    if not size:
        problems.append(f"photo={options.photo}: width x height in pixels is needed, such as 500x667")
    flags.stop_on(problems)
    return Benchmark(config, options, (int(size[1]), int(size[2])))

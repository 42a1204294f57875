"""What predict.py, export.py and app.py can be told beside the run they use. Standard library only."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config.training_config import (
    ConfigError,
    TrainingConfig,
    apply_flags,
    find_problems,
    find_range_problems,
    option,
    read_flags,
)
from runtime.run_dir import open_run, runs_here

# Settings of the run that may be others here: where and how fast it computes.
COMPUTING = ("mixed_precision", "load_in_4bit", "gpu_memory_fraction", "num_workers", "per_device_eval_batch_size")
OF_THE_DATA = ("dataset", "dataset_revision", "allow_missing", "max_unreadable_fraction")


@dataclass(frozen=True)
class PredictionOptions:
    top: int = option(5, "names told of each image", low=1)
    json: bool = option(False, "one JSON object a line")


@dataclass(frozen=True)
class ExportOptions:
    dtype: str = option("bf16", "of the merged weights", choices=("bf16", "fp16", "fp32"))
    adapter_only: bool = option(False, "the adapter alone, for the base model it was trained on")
    push_to_hub: str | None = option(None, "OWNER/NAME: the same files go there too, private unless it exists")
    limit: int | None = option(None, "val images that the exported model is scored on; none: all", low=1)


@dataclass(frozen=True)
class PageOptions:
    host: str = option("127.0.0.1", "0.0.0.0 shows the page to the whole network")
    port: int = option(7860, "of the page; 0: a free one", low=0, high=65535)
    open: bool = option(False, "show the page in this machine's browser")


class Use(NamedTuple):
    """A command line that uses a run."""

    folder: Path
    words: list[str]  # what stands alone behind the run
    config: TrainingConfig  # the run's, with what was given
    recorded: dict  # by the run
    options: PredictionOptions | ExportOptions | PageOptions


def parse_use(
    argv: list[str] | None, description: str, kind: type, of_the_run: tuple[str, ...], words: str = "", most: int = 0
) -> Use:
    """Flags of `kind`, a dataclass of knobs, and of these fields of the run's config, behind RUN and `words`.

    At least one of the words is needed if there are any, and at most `most` (0: as many as wanted). Every problem is
    printed at once; then SystemExit with status 2.
    """
    fields = [field for field in dataclasses.fields(TrainingConfig) if field.name in of_the_run]
    own = dataclasses.make_dataclass("OfTheRun", [(one.name, one.type, _like(one)) for one in fields])
    flags = read_flags(argv, description, (own, kind), words=f"RUN {words}".strip())
    options, problems = apply_flags(kind(), flags.given)
    problems = [*flags.problems, *problems, *find_range_problems(options)]
    folder, *rest = map(str, flags.words or [""])
    config, recorded = TrainingConfig(), {}
    if not folder:
        problems.append(f"name a run ({runs_here()}){' and ' * bool(words)}{words}")
    else:
        try:
            config, recorded = open_run(folder)
        except ConfigError as error:
            problems.append(f"{error}. Runs here: {runs_here()}")
        if words and not rest:
            problems.append(f"{folder}: name {words} behind it")
        if len(rest) > (most or len(rest)) or (rest and not words):
            problems.append(f"{' '.join(rest[most:])}: one too many; usage: RUN {words}".rstrip())
    config = dataclasses.replace(config, compile="false")  # too few images to win it back
    config, more = apply_flags(config, {name: text for name, text in flags.given.items() if name in of_the_run})
    flags.stop_on([*problems, *more, *find_problems(config)])
    return Use(Path(folder), rest, config, recorded, options)


def _like(field: dataclasses.Field):
    return dataclasses.field(default=field.default, metadata=field.metadata)

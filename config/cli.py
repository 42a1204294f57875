"""Command lines of all scripts, made from the fields of dataclasses of options. Standard library only.

Flags are spelled --output-dir or --output_dir. A boolean flag without a value is true, `none` is None. All problems of
a command line are printed at once, before anything heavy is imported; then exit status 2.
"""

import argparse
import dataclasses
import itertools
import sys
import typing
from collections.abc import Callable
from pathlib import Path

from config.training_config import (
    CONFIG_FILE,
    PRESETS,
    ConfigError,
    TrainingConfig,
    describe_type,
    field_choices,
    field_types,
    find_problems,
    format_value,
    nearest_name,
    option,
    resolve_paths,
)

# Options of a run that may differ when it is used: where and how fast it computes, and which images it is given.
COMPUTE_FIELDS = ("mixed_precision", "load_in_4bit", "gpu_memory_fraction", "num_workers", "per_device_eval_batch_size")
DATA_FIELDS = ("dataset", "dataset_revision", "allow_missing", "max_bad_fraction", "group_by", "min_images", "taxonomy")
MISSING = object()  # the value of a flag that was given without one
BOOLEAN_WORDS = ("true", "false", "yes", "no", "on", "off", "1", "0")  # what people write; the first two are accepted


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """Of evaluate.py; training evaluates with the defaults."""

    split: typing.Literal["val", "test"] = option("val", "held-out images")
    protocol: typing.Literal["scoring", "generation", "both"] = option("scoring", "generation: open-ended replies")
    limit: int | None = option(None, "images of the split, sampled with a fixed seed; none: all", low=1)
    per_token: bool = option(False, "divide each name's log-likelihood by its number of tokens")
    prior_calibration: bool = option(False, "subtract each name's log-likelihood on a plain gray image")
    target_selective_accuracy: float = option(0.95, "of accepted images; sets the threshold, on val", above=0, high=1)
    coverage: float = option(0.9, "share of images whose prediction set has the true name", above=0, high=0.999)
    csv: bool = option(False, "tables for spreadsheets too: of the images, and of the classes")
    ood: str | None = option(None, "folder of images of none of the classes: how many are rejected?")


class CommandLine:
    """The flags and positional words of a command line, and all problems found so far.

    Has a flag for each field of `options` (a dataclass type, or None) and of TrainingConfig. `refused` maps fields of
    TrainingConfig to the reason why this script does not take them: --help leaves them out, giving one is a problem.
    """

    def __init__(self, argv: list[str] | None, description: str, options=None, words: str = "", refused=None):
        refused = refused or {}
        fields = [*(dataclasses.fields(options) if options else ()), *dataclasses.fields(TrainingConfig)]
        self._parser = _build_parser(description, fields, words, refused)
        argv = sys.argv[1:] if argv is None else argv
        argv = _complete_boolean_flags(argv, fields) if words else argv
        arguments, unknown = self._parser.parse_known_intermixed_args(argv)
        given = {name: value for name, value in vars(arguments).items() if value is not None}
        self.words: list[str] = given.pop("words", [])
        self.given: dict[str, str] = {name: value for name, value in given.items() if value is not MISSING}
        self.problems = [f"{_flag(name)}: a value is needed" for name, value in given.items() if value is MISSING]
        self.refuse(refused)
        offered = [_flag(field.name) for field in fields if field.name not in refused]
        names = {word: word.partition("=")[0].replace("_", "-") for word in unknown if word.startswith("-")}
        self.problems += [f"{word}: unknown flag{nearest_name(name, offered)}" for word, name in names.items()]
        if unknown and not names:
            self.problems.append(f"{' '.join(unknown)}: unexpected argument; options are given as --name value")

    def refuse(self, reasons: dict[str, str]) -> None:
        """Report the flags among these fields that were given, and ignore them from then on."""
        given = [name for name in reasons if name in self.given]
        self.problems += [f"{_flag(name)} {self.given.pop(name)}: {reasons[name]}" for name in given]

    def apply(self, base):
        """`base` (an instance of a dataclass of options), overridden by --preset and then by the flags; checked."""
        preset = self.given.get("preset", "default") if isinstance(base, TrainingConfig) else "default"
        if preset not in PRESETS:
            self.problems.append(f"--preset {preset}: not one of {', '.join(PRESETS)}{nearest_name(preset, PRESETS)}")
        values = dict(PRESETS.get(preset, {}))
        for field in dataclasses.fields(base):
            if field.name in self.given:
                try:
                    values[field.name] = _convert(self.given[field.name], field)
                except ValueError:
                    self.problems.append(f"{field.name}={self.given[field.name]}: {describe_type(field)} is needed")
        options = resolve_paths(dataclasses.replace(base, **values))
        self.problems += find_problems(options)
        return options

    def load_run(self, folder: str, load: Callable):
        """`load(folder)`, or None where that raises ConfigError, which is reported."""
        try:
            return load(folder)
        except ConfigError as error:
            self.problems.append(f"{error}. Runs here: {list_runs()}")
            return None

    def exit_on_problems(self) -> None:
        if self.problems:
            text = "".join(f"error: {problem}\n" for problem in dict.fromkeys(self.problems))
            self._parser.exit(2, f"{text}All options: --help\n")


def parse_config(argv: list[str] | None = None, description: str = "") -> TrainingConfig:
    """The defaults, overridden by the preset, then by the flags. SystemExit with status 2 if there are problems."""
    line = CommandLine(argv, description)
    config = line.apply(TrainingConfig())
    line.exit_on_problems()
    return config


def parse_run_command(
    argv: list[str] | None, description: str, options: type, overridable: tuple[str, ...], load: Callable, words=""
) -> tuple[typing.Any, list[str], typing.Any]:
    """(the Run with its config overridden by the flags, the words after it, the script's `options`).

    RUN is followed by `words` (none, one, or any number if it ends in "..."). Flags are those of `options` and of the
    run's config fields that are `overridable`. `load(folder)` gives the Run, a dataclass with a `config`, or raises
    ConfigError: config may not import runtime. SystemExit with status 2 if there are problems.
    """
    fixed = {name: "is fixed by the run" for name in vars(TrainingConfig()) if name not in overridable}
    usage = f"RUN {words}".rstrip()
    line = CommandLine(argv, description, options, usage, fixed)
    run: typing.Any = None
    rest = line.words[1:]
    extra = [] if words.endswith("...") else rest[len(words.split()) :]
    if not line.words:
        line.problems.append(f"RUN is missing; usage: {usage}. Runs here: {list_runs()}")
    else:
        run = line.load_run(line.words[0], load)
        if words and not rest:
            line.problems.append(f"{line.words[0]}: {words} is missing after it; usage: {usage}")
    if extra:
        line.problems.append(f"{' '.join(extra)}: unexpected argument; usage: {usage}")
    saved = run.config if run else TrainingConfig()
    config = line.apply(dataclasses.replace(saved, compile="false"))  # too few images to win the time back
    values = line.apply(options())
    line.exit_on_problems()
    return dataclasses.replace(run, config=config), rest, values


def list_runs() -> str:
    """The run directories below runs/, for a message."""
    return ", ".join(sorted(str(path.parent) for path in Path("runs").glob(f"*/{CONFIG_FILE}"))) or "none yet"


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _format_args(self, action, default_metavar: str) -> str:
        return "VALUE" if action.const is MISSING else "[true | false]"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message.removeprefix('argument ')}\nAll options: --help\n")


def _build_parser(description: str, fields: list[dataclasses.Field], words: str, refused) -> argparse.ArgumentParser:
    preset = "" if "preset" in refused else "[--preset NAME] "
    parser = _Parser(
        description=description,
        usage=f"%(prog)s {words} {preset}[--option VALUE ...]".replace("  ", " "),
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        epilog=f"presets: {', '.join(PRESETS)}. `none`, as in --image-size none, means: no value." if preset else None,
    )
    if words:
        parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for field in fields:
        const = "true" if isinstance(field.default, bool) else MISSING
        choices = f" ({' | '.join(field_choices(field))})" if field_choices(field) else ""
        text = f"{field.metadata['help']}{choices} [{format_value(field.default)}]".replace("%", "%%")
        shown = argparse.SUPPRESS if field.name in refused else text
        for flag, text in {f"--{field.name}": argparse.SUPPRESS, _flag(field.name): shown}.items():
            parser.add_argument(flag, dest=field.name, nargs="?", const=const, help=text)
    return parser


def _complete_boolean_flags(argv: list[str], fields: list[dataclasses.Field]) -> list[str]:
    """`--json photo.jpg` becomes `--json=true photo.jpg`: only a word that looks like a boolean is its value."""
    names = [field.name for field in fields if isinstance(field.default, bool)]
    flags = {*map(_flag, names), *(f"--{name}" for name in names)}
    end = argv.index("--") if "--" in argv else len(argv)  # after it there are no flags
    return [
        f"{word}=true" if word in flags and following.lower() not in BOOLEAN_WORDS else word
        for word, following in itertools.zip_longest(argv[:end], argv[1:end], fillvalue="")
    ] + argv[end:]


def _convert(text: str, field: dataclasses.Field):
    """The value of a field from its text. Raises ValueError."""
    types = field_types(field)
    if type(None) in types and text.lower() == "none":
        return None
    if bool not in types:
        return types[0](text)
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

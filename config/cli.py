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
    field_types,
    find_problems,
    format_value,
    nearest_name,
    resolve_paths,
)

# Options of a run that may differ when it is used: where and how fast it computes, and which images it is given.
COMPUTE_FIELDS = ("mixed_precision", "load_in_4bit", "gpu_memory_fraction", "num_workers", "per_device_eval_batch_size")
DATA_FIELDS = ("dataset", "dataset_revision", "allow_missing", "max_unreadable_fraction", "group_by", "min_images")
MISSING = object()  # the value of a flag that was given without one
BOOLEAN_WORDS = ("true", "false", "yes", "no", "on", "off", "1", "0")  # what people write; the first two are accepted


class CommandLine:
    """The flags and positional words of a command line, and all problems found so far.

    Has a flag for each field of `options` (a dataclass type, or None) and of TrainingConfig. `refused` maps fields of
    TrainingConfig to the reason why this script does not take them: --help leaves them out, giving one is a problem.
    """

    def __init__(self, argv: list[str] | None, description: str, options=None, words: str = "", refused=None):
        self.refused: dict[str, str] = refused or {}
        fields = [*(dataclasses.fields(options) if options else ()), *dataclasses.fields(TrainingConfig)]
        self._parser = _build_parser(description, fields, words, self.refused)
        argv = sys.argv[1:] if argv is None else argv
        if words:
            argv = _complete_boolean_flags(argv, fields)
            arguments, unknown = self._parser.parse_known_intermixed_args(argv)
        else:
            arguments, unknown = self._parser.parse_known_args(argv)
        given = {name: value for name, value in vars(arguments).items() if value is not None}
        self.words: list[str] = given.pop("words", [])
        self.given: dict[str, str] = {name: value for name, value in given.items() if value is not MISSING}
        self.problems = [f"{_flag(name)}: a value is needed" for name, value in given.items() if value is MISSING]
        self.refuse(self.refused)
        offered = [_flag(field.name) for field in fields if field.name not in self.refused]
        for word in unknown:
            if word.startswith("-"):
                name = word.partition("=")[0].replace("_", "-")
                self.problems.append(f"{word}: unknown flag{nearest_name(name, offered)}")
        if unknown and not any(word.startswith("-") for word in unknown):
            self.problems.append(f"{' '.join(unknown)}: unexpected argument; options are given as --name value")

    def refuse(self, reasons: dict[str, str]) -> None:
        """Report the flags among these fields that were given."""
        given = [name for name in reasons if name in self.given]
        self.problems += [f"{_flag(name)} {self.given[name]}: {reasons[name]}" for name in given]

    def apply(self, base):
        """`base` (an instance of a dataclass of options), overridden by --preset and then by the flags; checked."""
        given = {name: text for name, text in self.given.items() if name not in self.refused}
        values = {}
        if isinstance(base, TrainingConfig) and "preset" in given:
            preset = given["preset"]
            values = dict(PRESETS.get(preset, {}))
            if preset not in PRESETS:
                nearest = nearest_name(preset, PRESETS)
                self.problems.append(f"--preset {preset}: not one of {', '.join(PRESETS)}{nearest}")
        for field in dataclasses.fields(base):
            if field.name in given:
                try:
                    values[field.name] = _convert(given[field.name], field)
                except ValueError:
                    self.problems.append(f"{field.name}={given[field.name]}: {describe_type(field)} is needed")
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


class RunCommand(typing.NamedTuple):
    """A command line of a script that uses a run."""

    run: typing.Any  # a runtime.run_dir.Run, its config overridden by the flags
    words: list[str]  # positional, after the run
    options: typing.Any  # of the script


def parse_config(argv: list[str] | None = None, description: str = "") -> TrainingConfig:
    """The defaults, overridden by the preset, then by the flags. SystemExit with status 2 if there are problems."""
    line = CommandLine(argv, description)
    config = line.apply(TrainingConfig())
    line.exit_on_problems()
    return config


def parse_run_command(
    argv: list[str] | None, description: str, options: type, overridable: tuple[str, ...], load: Callable, words=""
) -> RunCommand:
    """RUN, then `words` (none, one, or any number if it ends in "..."), with flags for `options` and for the fields of
    the run's config that are `overridable`.

    `load(folder)` gives the Run, a dataclass with a `config`, or raises ConfigError: config may not import runtime.
    SystemExit with status 2 if there are problems.
    """
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    fixed = {name: "is fixed by the run" for name in names if name not in overridable}
    usage = f"RUN {words}".rstrip()
    line = CommandLine(argv, description, options, usage, fixed)
    folder, rest = (line.words[0], line.words[1:]) if line.words else (None, [])
    run: typing.Any = None
    if folder is None:
        line.problems.append(f"RUN is missing; usage: {usage}. Runs here: {list_runs()}")
    else:
        run = line.load_run(folder, load)
        extra = rest if not words else [] if words.endswith("...") else rest[1:]
        if words and not rest:
            line.problems.append(f"{folder}: {words} is missing after it; usage: {usage}")
        if extra:
            line.problems.append(f"{' '.join(extra)}: unexpected argument; usage: {usage}")
    saved = TrainingConfig() if run is None else run.config
    config = line.apply(dataclasses.replace(saved, compile="false"))  # too few images to win the time back
    values = line.apply(options())
    line.exit_on_problems()
    return RunCommand(dataclasses.replace(run, config=config), rest, values)


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
        choices = f" ({' | '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        text = f"{field.metadata['help']}{choices} [{format_value(field.default)}]".replace("%", "%%")
        shown = argparse.SUPPRESS if field.name in refused else text
        parser.add_argument(_flag(field.name), dest=field.name, nargs="?", const=const, help=shown)
        if "_" in field.name:
            parser.add_argument(f"--{field.name}", dest=field.name, nargs="?", const=const, help=argparse.SUPPRESS)
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

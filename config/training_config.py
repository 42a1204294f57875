"""Every setting of a run, in one flat dataclass: edit a default below, or override it (--learning-rate 2e-4).

Reading order: the fields, PRESETS, the checks, the parser, saving and loading. Standard library only, so that a typo in
a flag costs a tenth of a second and not the import of torch.
"""

import argparse
import dataclasses
import difflib
import itertools
import json
import math
import os
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONFIG_FILE = "training_config.json"
RANDOM_MODELS = (
    "tiny",
    "scratch",
    "full",
)  # values of `model` that mean: built from config with random weights, no download
YES_OR_NO = ("true", "false", "yes", "no", "on", "off", "1", "0")  # what people write; the first two are taken
SOURCES = ("oxford_flowers102", "synthetic")  # values of `dataset` that are no folders, whatever lies here
CPU_MODELS = RANDOM_MODELS[:2]  # those small enough for a machine without a GPU


def option(default, help: str, *, low=None, above=None, high=None, choices=(), resumable: bool = False):
    """A field with its unit or reason (shown by --help) and its range: low <= value <= high, value > above.

    `resumable` marks what leaves the mathematics of a run alone, so that a run may go on after it was changed.
    """
    return dataclasses.field(
        default=default,
        metadata={"help": help, "low": low, "above": above, "high": high, "choices": choices, "resumable": resumable},
    )


class ConfigError(ValueError):
    """A run folder or saved config that cannot be used, said in one sentence."""


@dataclass(frozen=True)
class TrainingConfig:
    # ---- the run
    preset: str = option("default", "named variant of these defaults, in config/training_config.py", resumable=True)
    output_dir: str | None = option(
        None, "run folder; none: runs/<preset>, or the next free runs/<preset>-2, -3, ...", resumable=True
    )
    resume: str = option(
        "auto",
        "auto: go on where a run was left unfinished; never: begin a new one; or the run folder, or checkpoint, to go "
        "on from",
        resumable=True,
    )
    allow_changed: bool = option(
        False,
        "go on although data, precision or processes changed since the run began; said, not refused",
        resumable=True,
    )
    seed: int = option(42, "of data order, weights that start at random, dropout and splits", low=0, high=2**32 - 1)

    # ---- the model
    model: str = option(
        "llava-hf/llava-v1.6-mistral-7b-hf",
        f"any llava_next checkpoint: hub id or folder; {' or '.join(RANDOM_MODELS)}: built here",
    )
    model_revision: str | None = option(
        None, "branch, tag or commit on the hub; the commit it stood for is saved with the run"
    )
    load_in_4bit: bool = option(
        True, "nf4 with double quantization for the language model; vision tower and projector stay in 16 bit"
    )
    mixed_precision: str = option(
        "auto", "auto: bf16 where the GPU computes it natively, else fp16", choices=("auto", "bf16", "fp16", "no")
    )
    trainable: str = option(
        "adapter", "what learns", choices=("adapter", "adapter+projector", "projector", "everything")
    )
    lora_r: int = option(16, "rank of the adapter", low=1)
    lora_alpha: int = option(32, "the adapter's product is scaled by alpha / r", low=1)
    lora_dropout: float = option(
        0.0, "on the adapter's input; above 0 the stock layers compute, several times slower and not planned",
        low=0, high=0.9,
    )  # fmt: skip
    gradient_checkpointing: str = option(
        "auto",
        "recompute activations in the backward pass: slower, far less memory; auto: in as many layers as the GPU "
        "needs, in all without auto_batch; offload: in all, their inputs in the host's memory",
        choices=("auto", "true", "offload", "false"),
        resumable=True,
    )
    auto_batch: bool = option(
        True,
        "images per forward pass and recomputation as this GPU's memory allows, the images per step as configured; "
        "false: exactly what the config says",
        resumable=True,
    )
    compile: str = option(
        "auto",
        "one kernel for what stands between two matrix products; auto: on a CUDA GPU, if the run is long enough to "
        "win the time back",
        choices=("auto", "true", "false"),
        resumable=True,
    )
    sharding: str = option(
        "none",
        "fsdp: several processes spread the frozen weights over their GPUs and gather them layer by layer; images per "
        "forward pass and recomputation are then as configured",
        choices=("none", "fsdp"),
        resumable=True,
    )
    gpu_memory_fraction: float = option(
        0.9, "share of the GPU this process may take; the rest is a buffer", above=0, high=1, resumable=True
    )

    # ---- the data
    dataset: str = option(
        "oxford_flowers102", "oxford_flowers102 (hub), synthetic, or a folder: VGG release, parquet, or class folders"
    )
    dataset_revision: str = option("7e43fe37eeb9278138ab0bd2d0abb10d0f703d09", "commit of the hub data set")
    streaming: bool = option(
        False,
        "read train images from parquet files as they come, where the disk has no room for them as Arrow too; needs "
        "max_steps",
    )
    train_on_val: bool = option(False, "learn from train + val; nothing can be chosen or measured on val then")
    sample_fraction: float = option(1.0, "share of the train and val images used, class balance kept", above=0, high=1)
    val_fraction: float = option(0.1, "of an image folder without a val split", above=0, high=0.5)
    test_fraction: float = option(0.1, "of an image folder without a test split", above=0, high=0.5)
    allow_missing: bool = option(False, "go on although images named by the data set are not on disk")
    max_unreadable_fraction: float = option(
        0.01,
        "share of unreadable images above which the run stops; they are counted and named",
        low=0,
        high=1,
        resumable=True,
    )
    image_size: int | None = option(
        336, "images become squares of this side, in pixels; none: their own size, up to 5 tiles", low=28
    )
    question: str = option("What flower is shown in this image?", "what the model is asked about every image")
    num_workers: int = option(2, "processes that decode images; 0: the training process does", low=0, resumable=True)
    pin_memory: bool = option(True, "page-locked batches copy faster to a CUDA GPU", resumable=True)

    # ---- the optimizer
    per_device_train_batch_size: int = option(
        1, "images per forward pass where auto_batch does not choose: the memory option", low=1, resumable=True
    )
    gradient_accumulation_steps: int = option(
        16, "the product of the two is what the optimizer sees, whatever the number of GPUs", low=1, resumable=True
    )
    learning_rate: float = option(1e-5, "its peak", above=0)
    projector_learning_rate: float | None = option(None, "of the projector; none: learning_rate", above=0)
    lr_scheduler_type: str = option(
        "cosine", "decay after warm-up", choices=("cosine", "linear", "constant_with_warmup")
    )
    warmup_steps: float = option(0.03, "optimizer steps of linear warm-up; below 1: share of all steps", low=0)
    weight_decay: float = option(0.0, "AdamW's", low=0)
    max_grad_norm: float = option(0.5, "gradients are clipped to this norm", above=0)
    optim: str = option("adamw_torch_fused", "any optimizer name of transformers, e.g. paged_adamw_8bit")
    num_train_epochs: float = option(3.0, "passes over the train images", above=0, resumable=True)
    max_steps: int = option(-1, "optimizer steps; above 0 it overrides num_train_epochs", low=-1, resumable=True)

    # ---- when what happens, in optimizer steps
    logging_steps: int = option(10, "one step line each", low=1, resumable=True)
    eval_steps: int | None = option(
        100,
        "val images scored, best/ kept by their top-1, a fresh loss.png; none: only at the end",
        low=1,
        resumable=True,
    )
    early_stopping_patience: int | None = option(
        None, "evaluations without a gain in top-1 after which the run stops; none: never", low=1, resumable=True
    )
    early_stopping_min_gain: float | None = option(
        None,
        "gain in top-1 that counts; none: the standard error that the number of val images allows",
        low=0,
        resumable=True,
    )
    save_steps: int = option(50, "a checkpoint each", low=1, resumable=True)
    max_skipped_steps: int = option(
        0,
        "steps in a row without a finite loss and gradient that are left out before the run stops",
        low=0,
        resumable=True,
    )
    save_total_limit: int = option(2, "checkpoints kept; two, so that one survives a torn save", low=2, resumable=True)
    per_device_eval_batch_size: int = option(4, "images per forward pass of an evaluation", low=1, resumable=True)
    report_to: str = option("none", "trackers of transformers, with commas: tensorboard,wandb", resumable=True)

    @property
    def effective_batch_size(self) -> int:
        """Images per optimizer step, over all GPUs."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


PRESETS: dict[str, dict] = {
    "default": {},
    # Drawn flowers and a LLaVA-NeXT of 0.7 million random weights, all of them trained, on two CPU cores.
    "tiny": dict(
        model="tiny",
        dataset="synthetic",
        image_size=70,
        trainable="everything",
        load_in_4bit=False,
        mixed_precision="no",
        gradient_checkpointing="false",
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        learning_rate=6e-4,
        warmup_steps=0.1,
        weight_decay=0.05,
        max_grad_norm=1.0,
        max_steps=700,
        eval_steps=None,
        save_steps=350,
        per_device_eval_batch_size=50,
        num_workers=1,
    ),
    # A LLaVA-NeXT of 27 million random weights that learns flowers from real images alone, on a GPU in minutes.
    "scratch": dict(
        model="scratch",
        image_size=112,
        trainable="everything",
        load_in_4bit=False,
        gradient_checkpointing="false",
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        learning_rate=4e-4,
        warmup_steps=0.1,
        weight_decay=0.1,
        max_grad_norm=1.0,
        num_train_epochs=60.0,
        eval_steps=64,
        save_steps=256,
        per_device_eval_batch_size=64,
        num_workers=6,
    ),
    # Images at their own resolution: about 2,340 image tokens each in place of 1,176.
    "native": dict(image_size=None),
    "projector": dict(trainable="projector", learning_rate=2e-5),
    # The setting of arXiv 2405.18415. It trains on val, so it runs its fixed length and nothing is chosen on val.
    "published": dict(
        trainable="adapter+projector",
        lora_r=128,
        lora_alpha=256,
        learning_rate=2e-4,
        projector_learning_rate=2e-5,
        gradient_accumulation_steps=64,
        num_train_epochs=50.0,
        train_on_val=True,
        eval_steps=None,
        question="What type of object is in this photo?",
    ),
}


def find_problems(config: TrainingConfig) -> Iterator[str]:
    """One sentence per setting that cannot work: name and value, reason, next move."""
    yield from find_range_problems(config)
    if config.trainable == "everything" and config.load_in_4bit:
        yield (
            "trainable=everything with load_in_4bit=true: 4-bit weights cannot learn; use --load-in-4bit false or "
            "--trainable adapter"
        )
    if config.model in CPU_MODELS and config.load_in_4bit:
        yield (
            f"model={config.model} with load_in_4bit=true: a model built here has nothing to load in 4 bit; use "
            f"--preset {config.model}, or --load-in-4bit false"
        )
    if config.trainable == "everything" and config.sharding == "fsdp":
        yield (
            "trainable=everything with sharding=fsdp: frozen weights are spread, and nothing is frozen; use --sharding "
            "none or --trainable adapter"
        )
    if config.streaming:
        yield from _streaming_problems(config)
    for name, value in (("gradient_checkpointing", "offload"), ("compile", "true")):
        if getattr(config, name) == value and (config.lora_dropout > 0 or config.trainable == "everything"):
            yield (
                f"{name}={value}: has no effect with lora_dropout above 0 or trainable=everything, where the stock "
                f"layers compute; use {name}=auto, or --lora-dropout 0 and an adapter"
            )
    if config.projector_learning_rate is not None and "projector" not in config.trainable:
        yield (
            f"projector_learning_rate={config.projector_learning_rate}: trainable={config.trainable} leaves the "
            "projector "
            "as it is; use --trainable adapter+projector or --projector-learning-rate none"
        )
    if config.train_on_val and config.eval_steps is not None:
        yield (
            f"eval_steps={config.eval_steps} with train_on_val=true: images that are learned from measure nothing; "
            "use --eval-steps none or --train-on-val false"
        )
    if config.early_stopping_patience is not None and config.eval_steps is None:
        yield (
            f"early_stopping_patience={config.early_stopping_patience} with eval_steps=none: nothing is measured while "
            "training; use --early-stopping-patience none, or set --eval-steps (not with --train-on-val true)"
        )
    if config.max_steps == 0:
        yield "max_steps=0: nothing would be trained; use -1 for num_train_epochs, or a number of steps"
    if not config.question.strip() or config.question != config.question.strip() or "  " in config.question:
        yield (
            f"question={config.question!r}: empty, or with spaces at an end or doubled, which tokenizers treat "
            "differently; "
            "use single spaces between words"
        )
    if not _is_tracker_list(config.report_to):
        yield f"report_to={config.report_to!r}: use none, all, or names with commas such as tensorboard,wandb"


def _streaming_problems(config: TrainingConfig) -> Iterator[str]:
    if config.max_steps <= 0:
        yield f"streaming=true with max_steps={config.max_steps}: a stream has no end; give a number of steps"
    if config.dataset in SOURCES:
        yield f"streaming=true with dataset={config.dataset}: only a folder of parquet files is streamed; use false"
    if config.sample_fraction < 1 or config.train_on_val:
        yield (
            f"streaming=true with sample_fraction={config.sample_fraction} and train_on_val="
            f"{_show(config.train_on_val)}: both need all images at once; use 1 and false, or --streaming false"
        )


def find_range_problems(options) -> Iterator[str]:
    """One sentence per field of a dataclass of knobs whose value is of another kind or out of its range."""
    for field in dataclasses.fields(options):
        yield from _field_problems(field, getattr(options, field.name))


def _field_problems(field: dataclasses.Field, value) -> Iterator[str]:
    limits = field.metadata
    kinds = _kinds(field)
    if value is None:
        if type(None) not in kinds:
            yield f"{field.name}=none: a value is needed; the default is {_show(field.default)}"
    elif isinstance(value, bool) != (bool in kinds) or not isinstance(
        value, kinds + ((int,) if float in kinds else ())
    ):
        yield f"{field.name}={value!r}: {_describe(kinds)} is needed; the default is {_show(field.default)}"
    elif limits["choices"] and value not in limits["choices"]:
        yield f"{field.name}={value}: not one of {', '.join(limits['choices'])}{_nearest(value, limits['choices'])}"
    elif isinstance(value, (int, float)) and not _in_range(value, limits):
        yield f"{field.name}={_show(value)}: must be {_describe_range(limits)}; the default is {_show(field.default)}"


def _in_range(value: float, limits) -> bool:
    return (
        math.isfinite(value)
        and (limits["low"] is None or value >= limits["low"])
        and (limits["above"] is None or value > limits["above"])
        and (limits["high"] is None or value <= limits["high"])
    )


def _describe_range(limits) -> str:
    words = {"low": "at least", "above": "above", "high": "at most"}
    return " and ".join(f"{word} {limits[key]}" for key, word in words.items() if limits[key] is not None) or "finite"


def _kinds(field: dataclasses.Field) -> tuple[type, ...]:
    return typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)


def _describe(kinds: tuple[type, ...]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}
    return " or ".join(names[kind] for kind in kinds)


def _show(value) -> str:
    return (
        {None: "none", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else f"{value}"
    )


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _is_tracker_list(report_to: str) -> bool:
    return all(part and part.replace("_", "").isalnum() for part in report_to.split(","))


def parse_config(argv: list[str] | None = None, description: str = "") -> TrainingConfig:
    """Defaults, then the preset, then the flags. Every problem is printed at once; then SystemExit with status 2."""
    flags = read_flags(argv, description, (TrainingConfig,))
    config, problems = apply_flags(TrainingConfig(), flags.given)
    flags.stop_on([*flags.problems, *problems, *find_problems(config)])
    return config


class Flags(typing.NamedTuple):
    """A command line, taken apart but not yet converted."""

    given: dict[str, str]  # field name -> text
    words: list[str]  # what stands alone
    problems: list[str]
    parser: argparse.ArgumentParser

    def stop_on(self, problems: list[str]) -> None:
        """Print them all and end with status 2, if there are any."""
        if problems:
            self.parser.exit(2, "".join(f"error: {problem}\n" for problem in problems) + "All settings: --help\n")


def read_flags(argv: list[str] | None, description: str, kinds: tuple[type, ...], words: str | None = None) -> Flags:
    """Flags for every field of these dataclasses of knobs; `words` names what may stand alone, None: nothing may."""
    parser = _build_parser(description, kinds, words)
    argv = _spelled_out(sys.argv[1:] if argv is None else argv, kinds, bool(words))
    # Words may stand between flags; without any, argparse's own order is the same.
    flags, unknown = (parser.parse_known_intermixed_args if words else parser.parse_known_args)(argv)
    known = [action.option_strings[0] for action in parser._actions if action.option_strings]
    problems = [
        f"{word}: unknown flag{_nearest(word.split('=')[0], known)}" for word in unknown if word.startswith("-")
    ]
    if unknown and not problems:
        problems.append(f"{' '.join(unknown)}: stands alone; settings are given as --name value")
    given = {name: text for name, text in vars(flags).items() if text is not None}
    return Flags(given, given.pop("words", []), problems, parser)


def apply_flags(base, given: dict[str, str]) -> tuple[typing.Any, list[str]]:
    """(`base`, a dataclass of knobs, with what was given for its fields; problems). --preset comes before the rest."""
    values, problems = {}, []
    if isinstance(base, TrainingConfig) and "preset" in given:
        if given["preset"] not in PRESETS:
            nearest = _nearest(given["preset"], PRESETS)
            problems.append(f"--preset {given['preset']}: not one of {', '.join(PRESETS)}{nearest}")
        values = dict(PRESETS.get(given["preset"], {}))
    for field in dataclasses.fields(base):
        if field.name in given:
            try:
                values[field.name] = _convert(given[field.name], _kinds(field))
            except ValueError:
                problems.append(f"{field.name}={given[field.name]}: {_describe(_kinds(field))} is needed")
    return _with_whole_paths(dataclasses.replace(base, **values)), problems


def _with_whole_paths(settings):
    """Folders as they are found from anywhere: a run is used later, from another folder."""
    folders = {name: getattr(settings, name, None) for name in ("model", "dataset")}
    whole = {
        name: os.path.abspath(path)
        for name, path in folders.items()
        if path and path not in (*RANDOM_MODELS, *SOURCES) and os.path.isdir(path)
    }
    return dataclasses.replace(settings, **whole) if whole else settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message.removeprefix('argument ')}\nAll settings: --help\n")


def _build_parser(description: str, kinds: tuple[type, ...], words: str | None) -> argparse.ArgumentParser:
    is_whole = TrainingConfig in kinds
    parser = _Parser(
        description=description,
        usage=f"%(prog)s {f'{words} ' if words else ''}{'[--preset NAME] ' * is_whole}[--setting value ...]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"presets: {', '.join(PRESETS)}. --image-size none and the like mean: no value." if is_whole else None,
    )
    if words:
        parser.add_argument("words", nargs="*", metavar=words, help=argparse.SUPPRESS)
    for field in itertools.chain(*map(dataclasses.fields, reversed(kinds))):
        choices = f" ({' | '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            metavar="VALUE",
            help=f"{field.metadata['help']}{choices} [{_show(field.default)}]".replace("%%", "%").replace("%", "%%"),
        )
    return parser


def _spelled_out(argv: list[str], kinds: tuple[type, ...], has_words: bool) -> list[str]:
    """--output_dir, as transformers spells it, is --output-dir; --json before a image is --json=true."""
    switches = {
        "--" + field.name.replace("_", "-")
        for field in itertools.chain(*map(dataclasses.fields, kinds))
        if bool in _kinds(field)
    }
    spelled, verbatim = [], []
    if "--" in argv:  # what stands behind it is no flag
        argv, verbatim = argv[: argv.index("--")], argv[argv.index("--") :]
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name, sign, value = word.partition("=") if word.startswith("--") else (word, "", "")
        name = name.replace("_", "-") if name.startswith("--") else name
        # Where words stand alone, what follows a switch is its value only if it looks like one.
        is_value = following.lower() in YES_OR_NO if has_words else following[:1] not in ("", "-")
        if name in switches and not sign and not is_value:
            sign, value = "=", "true"
        spelled.append(name + sign + value)
    return spelled + verbatim


def _convert(text: str, kinds: tuple[type, ...]):
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return next(kind for kind in kinds if kind is not type(None))(text)


def save_config(config: TrainingConfig, folder: str | Path, recorded: dict) -> None:
    """Write the resolved config beside the weights, with what the run found out: revision, versions, class names."""
    text = json.dumps({"config": dataclasses.asdict(config), "recorded": recorded}, indent=2)
    write_whole(Path(folder) / CONFIG_FILE, text + "\n")


def write_whole(path: Path, text: str) -> None:
    """The file holds the old text or the new one, whatever happens meanwhile."""
    draft = path.with_name(f"{path.name}.draft")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def load_config(folder: str | Path) -> tuple[TrainingConfig, dict]:
    """The config and the recorded facts of a run folder.

    Raises ConfigError where the file is missing, torn, or of another version of this program.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        recomputes = saved["config"].get("gradient_checkpointing")
        if isinstance(recomputes, bool):  # as it was saved before it could be auto
            saved["config"]["gradient_checkpointing"] = str(recomputes).lower()
        config, recorded = _with_whole_paths(TrainingConfig(**saved["config"])), dict(saved["recorded"])
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{folder}: not a run, {CONFIG_FILE} is missing. Start one with: python train.py --preset tiny"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as the config of a run ({error}); use another --output-dir"
        ) from error
    problems = list(find_range_problems(config))
    if problems:
        raise ConfigError(f"{path}: {'; '.join(problems)}; put back what was saved, or use another --output-dir")
    return config, recorded

"""All options of a run in one flat dataclass. Edit a default below, or override it: --learning-rate 2e-4.

Reading order: the fields, PRESETS, validation, save and load. Standard library only, so that a typo in a flag costs a
tenth of a second and not the import of torch.
"""

import dataclasses
import difflib
import math
import operator
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

CONFIG_FILE = "training_config.json"
RANDOM_MODELS = ("tiny", "scratch", "full")  # values of `model`: built from a config with random weights, no download
CPU_MODELS = ("tiny", "scratch")  # of these, the ones small enough for a machine without a GPU
SOURCES = ("oxford_flowers102", "synthetic")  # values of `dataset` that are no folders, even if one has that name


class ConfigError(ValueError):
    """A run directory or saved config that cannot be used; the message is one sentence."""


def option(default, help: str, *, low=None, above=None, high=None, resumable: bool = True):
    """A field with its unit or reason (shown by --help) and its range: low <= value <= high, value > above."""
    limits = {"low": low, "above": above, "high": high}
    return dataclasses.field(default=default, metadata={"help": help, "resumable": resumable, **limits})


def fixed(default, help: str, **limits):
    """An option that decides what a run computes, so that it may not change on resume."""
    return option(default, help, resumable=False, **limits)


@dataclass(frozen=True)
class TrainingConfig:
    # ---- run
    preset: str = option("default", "named variant of these defaults")
    output_dir: str | None = option(None, "run directory; none: runs/<preset>, or the next free runs/<preset>-2, ...")
    resume: str = option("auto", "auto: an interrupted run; never: a new one; or the run or checkpoint to resume")
    allow_changed: bool = option(False, "resume although data, precision or ranks changed")
    seed: int = fixed(42, "of data order, randomly initialized weights, dropout and splits", low=0, high=2**32 - 1)

    # ---- model
    model: str = fixed("llava-hf/llava-v1.6-mistral-7b-hf", "hub id or folder; tiny, scratch or full: random weights")
    model_revision: str | None = fixed(
        "52320fb52229c8d942b1dcb8b63b3dc8087bc83b",
        "branch, tag or commit of a hub model; as it is, of any but the default model the current commit",
    )
    load_in_4bit: bool = fixed(True, "language model in nf4 with double quantization; the rest stays in 16 bit")
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] = fixed("auto", "auto: bf16 where it is native, else fp16")
    trainable: Literal["adapter", "adapter+projector", "projector", "everything"] = fixed("adapter", "adapter: LoRA")
    lora_r: int = fixed(16, "rank of the adapter", low=1)
    lora_alpha: int = fixed(32, "the adapter's output is scaled by lora_alpha / lora_r", low=1)
    lora_dropout: float = fixed(0.0, "above 0 layers are not fused: several times slower", low=0, high=0.9)
    gradient_checkpointing: Literal["auto", "true", "offload", "false"] = option(
        "auto",
        "recompute activations: slower, less memory; auto: in as many layers as needed; offload: inputs to the CPU",
    )
    auto_batch: bool = option(
        True, "fit micro-batch and checkpointing to this GPU, at the configured global batch size"
    )
    compile: Literal["auto", "true", "false"] = option("auto", "elementwise kernels; auto: on CUDA, in a long run")
    matmul: Literal["bf16", "fp8"] = fixed("bf16", "by frozen weights in the backward pass; fp8: faster, less exact")
    sharding: Literal["none", "fsdp"] = option("none", "fsdp: shard frozen weights across ranks, without a memory plan")
    gpu_memory_fraction: float = option(0.9, "of GPU memory, for this process; the rest is a buffer", above=0, high=1)

    # ---- data
    dataset: str = fixed("oxford_flowers102", "or synthetic, a folder, table, parquet file, or owner/name of the hub")
    dataset_revision: str = fixed(
        "7e43fe37eeb9278138ab0bd2d0abb10d0f703d09",
        "branch, tag or commit of a hub data set; as it is, of any but Oxford Flowers 102 the current commit",
    )
    label_column: str | None = fixed(None, "column of a table or parquet file with the labels; none: by its name")
    class_names: str | None = fixed(None, "json or csv file that gives class folders or labels their names")
    taxonomy: str | None = option(None, "csv file: name, genus and family of the classes; none: the data set's")
    streaming: bool = fixed(False, "read train images from parquet files, without an Arrow copy; needs max_steps")
    train_on_val: bool = fixed(False, "train on train + val; val can then neither select nor measure anything")
    sample_fraction: float = fixed(1.0, "of the train and val images used, classes kept balanced", above=0, high=1)
    val_fraction: float = fixed(0.1, "of each class, for a data set without a val split", above=0, high=0.5)
    test_fraction: float = fixed(0.1, "of each class, for a data set without a test split", above=0, high=0.5)
    group_by: str | None = fixed(
        None,
        "regular expression of what file names (or paths) of images of one plant have in common; one split gets all",
    )
    min_images: int = fixed(1, "classes with fewer images are not used", low=1)
    holdout_classes: int = fixed(0, "drawn by seed and not learned; does evaluate.py notice their images?", low=0)
    class_balance: bool = fixed(False, "show images of rare classes more often, by the square root of their number")
    augmentation: Literal["none", "light"] = fixed("none", "light: crop and flip train images, change their light")
    allow_missing: bool = fixed(False, "continue although images that the data set lists are not on disk")
    max_bad_fraction: float = option(0.01, "of images that may be unreadable before the run stops", low=0, high=1)
    image_size: int | None = fixed(336, "side of resized images; none: own size, up to 5 tiles", low=28, high=4096)
    views: Literal["anyres", "base"] = fixed("anyres", "base: an image in one tile, half the time and memory or less")
    question: str = fixed("What flower is shown in this image?", "what the model is asked about every image")
    num_workers: int = option(2, "processes that decode images; 0: the training process", low=0)
    pin_memory: bool = option(True, "page-locked batches: faster copies to a CUDA GPU")

    # ---- optimizer
    per_device_train_batch_size: int = option(1, "micro-batch size without auto_batch", low=1)
    gradient_accumulation_steps: int = option(16, "times micro-batch size: the global batch size, of all GPUs", low=1)
    learning_rate: float = fixed(1e-5, "peak learning rate", above=0)
    projector_learning_rate: float | None = fixed(None, "of the projector; none: learning_rate", above=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = fixed("cosine", "after warm-up")
    warmup_steps: float = fixed(0.03, "optimizer steps of linear warm-up; below 1: fraction of all steps", low=0)
    weight_decay: float = fixed(0.0, "of AdamW", low=0)
    max_grad_norm: float = fixed(0.5, "gradient norm is clipped to this", above=0)
    optim: str = fixed("adamw_torch_fused", "any optimizer name of transformers, e.g. paged_adamw_8bit")
    num_train_epochs: float = option(3.0, "passes over the train images", above=0)
    max_steps: int = option(-1, "optimizer steps; above 0 it overrides num_train_epochs", low=-1)

    # ---- logging, evaluation and saving, in optimizer steps
    logging_steps: int = option(10, "between two step lines of the log", low=1)
    eval_steps: int | None = option(100, "between evaluations on val, which select best/; none: only at the end", low=1)
    early_stopping_patience: int | None = option(None, "evaluations without gain before a stop; none: never", low=1)
    early_stopping_min_gain: float | None = option(None, "val accuracy gain that counts; none: standard error", low=0)
    save_steps: int = option(50, "between two checkpoints", low=1)
    max_skipped_steps: int = option(0, "non-finite steps in a row that are skipped", low=0)
    save_total_limit: int = option(2, "checkpoints kept; two, in case one is corrupted", low=2)
    per_device_eval_batch_size: int = option(16, "images per forward pass of an evaluation, if they fit", low=1)
    report_to: str = option("none", "trackers of transformers, comma-separated: tensorboard,wandb")

    @property
    def effective_batch_size(self) -> int:
        """Images per optimizer step, over all GPUs."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def find_warmup_problem(self, steps: int) -> str | None:
        """A sentence for a warm-up, in steps, that is not over within the `steps` of a run."""
        if 1 <= self.warmup_steps < steps or self.warmup_steps < 1:
            return None
        reason = f"as long as the run of {steps} steps or longer, so the learning rate would never reach its peak"
        return f"warmup_steps={self.warmup_steps:g}: {reason}; use fewer, or a fraction such as 0.03"

    def find_conflicts(self) -> Iterator[str]:
        """A sentence per combination of values that cannot work."""
        kind, steps, rate = self.trainable, self.eval_steps, self.projector_learning_rate
        everything = kind == "everything"
        if everything and self.load_in_4bit:
            yield "trainable=everything with load_in_4bit=true: 4-bit weights cannot be trained; use load_in_4bit=false"
        if self.model in CPU_MODELS and self.load_in_4bit:
            yield f"model={self.model} with load_in_4bit=true: its weights are not loaded; use --preset {self.model}"
        if everything and self.sharding == "fsdp":
            yield "trainable=everything with sharding=fsdp: only frozen weights are sharded; use --sharding none"
        for name, value in (("gradient_checkpointing", "offload"), ("compile", "true"), ("matmul", "fp8")):
            if getattr(self, name) == value and (self.lora_dropout > 0 or everything):
                reason = "has no effect with lora_dropout above 0 or trainable=everything, which use no fused layers"
                move = f"use {name}={getattr(TrainingConfig, name)}, or --lora-dropout 0 and an adapter"
                yield f"{name}={value}: {reason}; {move}"
        if rate is not None and "projector" not in kind:
            yield f"projector_learning_rate={rate}: trainable={kind} freezes the projector; use adapter+projector"
        if self.train_on_val and steps is not None:
            yield f"eval_steps={steps} with train_on_val=true: images that are trained on measure nothing; use none"
        if self.early_stopping_patience is not None and steps is None:
            given = f"early_stopping_patience={self.early_stopping_patience} with eval_steps=none"
            move = "use --early-stopping-patience none, or set --eval-steps (not with train_on_val=true)"
            yield f"{given}: nothing is measured during training; {move}"
        if self.max_steps == 0:
            yield "max_steps=0: there is nothing to train; use -1 for num_train_epochs, or a number of steps"
        if self.max_steps > 0 and (problem := self.find_warmup_problem(self.max_steps)):
            yield problem
        if not self.question or self.question != self.question.strip() or "  " in self.question:
            reason = "empty, or with leading, trailing or double spaces, which tokenizers treat differently"
            yield f"question={self.question!r}: {reason}; use single spaces between words"
        if not all(name.replace("_", "").isalnum() for name in self.report_to.split(",")):
            yield f"report_to={self.report_to!r}: use none, all, or names with commas such as tensorboard,wandb"
        if self.group_by is not None and (fault := _why_no_pattern(self.group_by)):
            example = "for 148_1.jpg, 148_2.jpg: ^(\\d+)_"
            yield f"--group-by {self.group_by!r}: not a regular expression ({fault}); {example}"
        if self.streaming:
            yield from self._find_streaming_conflicts()

    def _find_streaming_conflicts(self) -> Iterator[str]:
        if self.max_steps <= 0:
            yield f"streaming=true with max_steps={self.max_steps}: a stream has no length; set --max-steps"
        if self.dataset in SOURCES:
            yield f"streaming=true with dataset={self.dataset}: only a folder of parquet files is streamed; use false"
        names = ("group_by", "min_images", "holdout_classes", "class_balance", "sample_fraction", "train_on_val")
        for name in names:
            value, default = getattr(self, name), getattr(TrainingConfig, name)
            if value != default:
                move = f"use {format_value(default)}, or streaming=false"
                yield f"streaming=true with {name}={format_value(value)}: it needs all images at once; {move}"


PRESETS: dict[str, dict] = {
    "default": {},
    # Synthetic images and a LLaVA-NeXT of 0.7 million random weights, all of them trained, on two CPU cores.
    "tiny": dict(
        model="tiny", trainable="everything", load_in_4bit=False, mixed_precision="no", gradient_checkpointing="false",
        dataset="synthetic", image_size=70, num_workers=1,
        per_device_train_batch_size=16, gradient_accumulation_steps=1, learning_rate=6e-4, warmup_steps=0.1,
        weight_decay=0.05, max_grad_norm=1.0, max_steps=700,
        eval_steps=None, save_steps=350, per_device_eval_batch_size=50,
    ),
    # A LLaVA-NeXT of 27 million random weights, trained on real images alone, on a GPU in minutes.
    "scratch": dict(
        model="scratch", trainable="everything", load_in_4bit=False, gradient_checkpointing="false",
        image_size=112, num_workers=6,
        per_device_train_batch_size=64, gradient_accumulation_steps=1, learning_rate=4e-4, warmup_steps=0.1,
        weight_decay=0.1, max_grad_norm=1.0, num_train_epochs=60.0,
        eval_steps=64, save_steps=256, per_device_eval_batch_size=64,
    ),
    # Images at their own resolution: about 2,340 image tokens each in place of 1,176.
    "native": dict(image_size=None),
    "projector": dict(trainable="projector", learning_rate=2e-5),
    # The setting of arXiv 2405.18415. It trains on val, so it runs its fixed length and nothing is chosen on val.
    "published": dict(
        trainable="adapter+projector", lora_r=128, lora_alpha=256,
        train_on_val=True, eval_steps=None, question="What type of object is in this photo?",
        gradient_accumulation_steps=64, learning_rate=2e-4, projector_learning_rate=2e-5, num_train_epochs=50.0,
    ),
}  # fmt: skip


# ---- validation

BOUNDS = {"low": ("at least", operator.ge), "above": ("above", operator.gt), "high": ("at most", operator.le)}


def find_problems(options) -> Iterator[str]:
    """A sentence per value of a dataclass of options that cannot work: name and value, reason, next move."""
    yield from find_range_problems(options)
    yield from getattr(options, "find_conflicts", tuple)()


def _why_no_pattern(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        return f"{error}"
    return "" if text else "it is empty"


def find_range_problems(options) -> Iterator[str]:
    """A sentence per field of a dataclass of options whose value is of another type or out of its range."""
    for field in dataclasses.fields(options):
        name, value, kinds, choices = field.name, getattr(options, field.name), field_types(field), field_choices(field)
        accepted = (*kinds, int) if float in kinds else kinds
        default = f"the default is {format_value(field.default)}"
        if value is None and type(None) not in kinds:
            yield f"{name}=none: a value is needed; {default}"
        elif isinstance(value, bool) != (bool in kinds) or not isinstance(value, accepted):
            yield f"{name}={value!r}: {describe_type(field)} is needed; {default}"
        elif choices and value not in choices:
            yield f"{name}={value}: not one of {', '.join(choices)}{nearest_name(str(value), choices)}"
        elif isinstance(value, (int, float)):
            bounds = {bound: limit for bound in BOUNDS if (limit := field.metadata[bound]) is not None}
            if not (math.isfinite(value) and all(BOUNDS[bound][1](value, limit) for bound, limit in bounds.items())):
                words = " and ".join(f"{BOUNDS[bound][0]} {limit}" for bound, limit in bounds.items())
                yield f"{name}={format_value(value)}: must be {words or 'finite'}; {default}"


def field_choices(field: dataclasses.Field) -> tuple[str, ...]:
    return typing.get_args(field.type) if typing.get_origin(field.type) is Literal else ()


def field_types(field: dataclasses.Field) -> tuple[type, ...]:
    if field_choices(field):
        return (str,)
    return typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)


def describe_type(field: dataclasses.Field) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}
    return " or ".join(names[kind] for kind in field_types(field))


def format_value(value) -> str:
    """As it is written on a command line."""
    return f"{value}".lower() if value is None or isinstance(value, bool) else f"{value}"


def nearest_name(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


# ---- save and load


def resolve_paths(options):
    """`options` with the paths in them as absolute paths: a run is used later from anywhere."""
    found = {}
    for name in ("model", "dataset", "class_names", "taxonomy"):
        path = os.path.expanduser(getattr(options, name, None) or "")
        if path and path not in (*RANDOM_MODELS, *SOURCES) and os.path.exists(path):
            found[name] = os.path.abspath(path)
    return dataclasses.replace(options, **found)


def config_from_dict(saved: dict) -> TrainingConfig:
    """The config of a run from the fields that it saved. Raises ConfigError with all that is wrong with them."""
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    problems = [f"{name}: no such option" for name in saved if name not in known]
    config = TrainingConfig(**{name: value for name, value in saved.items() if name in known})
    problems += find_range_problems(config)
    if problems:
        raise ConfigError("; ".join(problems))
    return resolve_paths(config)

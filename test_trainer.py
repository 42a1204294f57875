"""Pre-flight: are this machine, data and model ready for `python train.py` with the same flags?

    python test_trainer.py                   for the documented run
    python test_trainer.py --preset tiny     on any machine, about 20 seconds

Cheapest checks first, one line each. Exit status 1 if any failed. Writes no run.
"""

import ctypes
import itertools
import logging
import math
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from config.cli import parse_config
from config.training_config import RANDOM_MODELS, TrainingConfig, format_value
from runtime.run_dir import Run
from runtime.run_files import read_metrics
from utils.logging_utils import UserError, exit_status, report_errors, set_environment, setup_logging

STEPS = 6  # optimizer steps of the trial; the first two may still allocate
LEAK_GIB = 0.06  # growth over the later steps that counts as a leak
PRETRAINED_LOSS = 0.05, 4.0  # around the documented 0.5 to 2.0: class names differ in difficulty
HUB_BYTES = 20e9  # of a 7B checkpoint and the images
RUN_BYTES = 1e9  # of disk that any run needs
GIB = 2**30


@dataclass
class PreFlight:
    """What the checks have found so far, for the checks that need it."""

    config: TrainingConfig
    device: Any = None  # torch.device
    data: Any = None  # data.dataset.PlantData
    rows: Any = None  # train rows that stand for all
    collator: Any = None  # data.collator.PlantCollator
    batch: Any = None  # data.collator.Batch of one image
    plant: Any = None  # models.builder.PlantModel
    steps: list[dict] = field(default_factory=list)  # metrics of the trial


def main(argv: list[str] | None = None) -> int:
    config = parse_config(argv, __doc__)
    if os.environ.get("RANK", "0") != "0" and "WORLD_SIZE" in os.environ:  # rank 0 reports for all
        return 0
    set_environment()
    setup_logging()
    logging.getLogger("llava_plants").setLevel(logging.ERROR)  # the lines below say it
    with report_errors():
        return run_checks(PreFlight(config))


def run_checks(found: PreFlight) -> int:
    """Print a line for each check; returns the exit status."""
    passed, failed = [], []
    for check, needs in CHECKS:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        if missing := [need for need in (needs or "").split() if need not in passed]:
            print(f"skip  {name}: needs the {missing[0]} above", flush=True)
            continue
        try:
            line = f"ok    {name}: {check(found)}"
            passed.append(name)
        except KeyboardInterrupt as stop:
            print(f"stop  {name}: interrupted", flush=True)
            return exit_status(stop)
        except Exception as error:
            failed.append(name)
            reason = str(error) if isinstance(error, (UserError, ImportError)) else f"{type(error).__name__}: {error}"
            line = f"FAIL  {name}: {reason}"
        print(line, flush=True)
    if failed:
        print(f"{len(failed)} of {len(CHECKS)} checks failed: {', '.join(failed)}")
        return 1
    print("ready: python train.py with the same flags")
    return 0


# ---- the machine


def check_config(found: PreFlight) -> str:
    names = ("preset", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "max_grad_norm")
    names += ("mixed_precision", "load_in_4bit", "gradient_checkpointing", "auto_batch")
    return " | ".join(f"{name} {format_value(getattr(found.config, name))}" for name in names)


def check_packages(found: PreFlight) -> str:
    try:
        from packaging.requirements import Requirement
    except ImportError:
        raise UserError("no packages in this environment; run: pip install -r requirements.txt") from None
    installed, untested, missing = [], [], []
    lines = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for requirement in map(Requirement, filter(None, (line.partition("#")[0].strip() for line in lines))):
        try:
            installed.append(f"{requirement.name} {version(requirement.name)}")
        except PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(version(requirement.name).partition("+")[0]):
            untested.append(f"{installed[-1]} ({requirement.specifier} is pinned)")
    if missing:
        raise UserError(f"{', '.join(missing)} not installed; run: pip install -r requirements.txt")
    text = ", ".join(installed)
    return f"{text} | not the tested versions: {', '.join(untested)}" if untested else text


def check_driver(found: PreFlight) -> str:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; it needs no driver"
    supported = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(supported))
    except OSError:
        return f"none installed; torch {torch.__version__} needs one for CUDA {torch.version.cuda} to use a GPU"
    text = f"supports CUDA {supported.value / 1000:.1f}, torch {torch.__version__} needs {torch.version.cuda}"
    if supported.value // 1000 < int(torch.version.cuda.split(".")[0]):
        raise UserError(f"{text}; install a newer NVIDIA driver")
    return text


def check_device(found: PreFlight) -> str:
    import torch

    from runtime.device import choose_device, choose_precision

    share = found.config.gpu_memory_fraction
    device = found.device = choose_device(found.config.model, share)
    precision = choose_precision(found.config.mixed_precision, device)
    if device.type != "cuda":
        return f"{device.type} | precision {precision}"
    gpu = torch.cuda.get_device_properties(device)
    memory, capability = f"{gpu.total_memory / GIB:.1f} GiB", f"{gpu.major}.{gpu.minor}"
    return f"{gpu.name} | {memory}, {share:.0%} to be used | compute capability {capability} | precision {precision}"


def check_disk_and_memory(found: PreFlight) -> str:
    import psutil
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    from runtime.atomic import require_disk_space

    model, cache = found.config.model, Path(HF_HUB_CACHE).absolute()
    require_disk_space(Path("."), RUN_BYTES, "a run needs at least", "run it on another disk")
    is_on_hub = "/" in model and not Path(model).is_dir()
    if is_on_hub and try_to_load_from_cache(model, "model.safetensors.index.json") is None:  # still to be downloaded
        folder = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
        require_disk_space(folder, HUB_BYTES, f"{model} and the images need", "set HF_HOME to another disk")
    ram, free = psutil.virtual_memory(), shutil.disk_usage(".").free / 1e9
    return f"{free:.0f} GB of disk free here | {ram.available / GIB:.1f} of {ram.total / GIB:.1f} GiB of RAM free"


# ---- the data


def check_data(found: PreFlight) -> str:
    from data.dataset import build_datasets, sample_rows

    data = found.data = build_datasets(found.config)
    found.rows = sample_rows(data.train)
    counts = f"{data.num_train:,} train, {len(data.validation or ()):,} val, {len(data.test):,} test images"
    lines = [f"{data.source}: {counts}", *data.notes, *(f"warning: {warning}" for warning in data.warnings)]
    return "\n      ".join(lines)


def check_class_names(found: PreFlight) -> str:
    from data.labels import parse_reply

    names = found.data.class_names
    for index, name in enumerate(names):
        if parse_reply(name, names) != index:
            raise UserError(f"{name!r} reads like another class apart from case and punctuation; rename one")
    return f"{len(names)}: {', '.join(names if len(names) <= 4 else [*names[:3], '...', names[-1]])}"


def check_processor(found: PreFlight) -> str:
    from transformers import AutoProcessor

    from data.collator import PlantCollator
    from models.builder import build_processor
    from utils.tokenizer_utils import tokenizer_probe

    processor, prompt = build_processor(found.config, found.data.class_names)
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        if tokenizer_probe(AutoProcessor.from_pretrained(folder).tokenizer) != tokenizer_probe(processor.tokenizer):
            raise UserError("saving and loading changes what the tokenizer reads; convert it to a fast tokenizer")
    found.collator = PlantCollator(processor, prompt, found.data.class_names, found.config.image_size)
    turn = f"prompt {prompt.prompt!r}, then {prompt.response_prefix!r}, the class name, {prompt.eos!r}"
    return f"{turn} | the tokenizer survives saving"


def read_sizes(rows, max_bad_fraction: float) -> tuple[list[tuple[dict, tuple[int, int]]], list[str]]:
    """((row, (H, W) of its image), why others cannot be opened), as far as headers tell. ImageError for too many."""
    from data.dataset import check_unreadable_fraction
    from utils.image_utils import ImageError, read_image_size

    sizes, unreadable = [], []
    for row in rows:
        try:
            sizes.append((row, read_image_size(row["image"])))
        except ImageError as error:
            unreadable.append(f"{error}")
    check_unreadable_fraction(unreadable, len(rows), max_bad_fraction)
    return sizes, unreadable


def check_lengths(found: PreFlight) -> str:
    from data.dataset import sample_rows

    limit = found.config.max_bad_fraction
    read, unreadable = read_sizes(found.rows, limit)
    for rows in filter(None, (found.data.validation, found.data.test)):
        unreadable += read_sizes(sample_rows(rows), limit)[1]
    lengths = [found.collator.describe(row, size).length for row, size in read]
    sizes = [f"{width}x{height}" for _, (height, width) in read]
    if not lengths:
        raise UserError(f"none of {len(unreadable)} images can be opened: {unreadable[0]}")
    low, _, high = statistics.quantiles(lengths, n=4) if len(lengths) > 1 else lengths * 3
    text = f"{min(lengths):,} to {max(lengths):,} tokens, half between {low:,.0f} and {high:,.0f}"
    text += f" | {len(lengths):,} images read, width x height {', '.join(sizes[:4])}"
    return f"{text} | {len(unreadable)} unreadable: {unreadable[0]}" if unreadable else text


# ---- one batch


def check_sample(found: PreFlight) -> str:
    from evaluation.verify import first_readable

    processor = found.collator.processor
    batch = found.batch = found.collator(first_readable(found.collator, found.rows, 1))
    (sample,), ids = batch.samples, batch["input_ids"][0]
    expanded, short = processor.image_token * sample.image_tokens, f"{processor.image_token} x {sample.image_tokens:,} "
    prompt = processor.tokenizer.decode(ids[: sample.prompt_length]).replace(expanded, short)
    return f"{prompt!r} -> supervised: {processor.tokenizer.decode(ids[sample.prompt_length :])!r}"


def check_image_tokens(found: PreFlight) -> str:
    collator = found.collator
    before = collator.answers[found.batch.samples[0].label].text.count(collator.processor.image_token)
    after = int((found.batch["input_ids"][0] == collator.processor.image_token_id).sum())
    return f"Number of image tokens: {before} (expanded to {after:,}, as many as feature rows)"


def check_pixels(found: PreFlight) -> str:
    processor = found.collator.processor
    patches = (processor.image_processor.crop_size["height"] // processor.patch_size) ** 2
    shape = f"pixel_values {tuple(found.batch['pixel_values'].shape)} (images, tiles, channels, height, width)"
    cls = " + 1 CLS" if processor.vision_feature_select_strategy == "default" else ""
    return f"{shape} | {patches} patches of {processor.patch_size} x {processor.patch_size}{cls} per tile"


def check_padding(found: PreFlight) -> str:
    batch = found.collator(list(itertools.islice(found.rows, 8)))
    length = batch["input_ids"].shape[1]
    pads = [length - sample.length for sample in batch.samples]
    supervised = (batch["shift_labels"] != -100).sum(dim=1).tolist()
    expected = [sample.length - sample.prompt_length for sample in batch.samples]
    if supervised != expected:
        raise UserError(f"{supervised} tokens are supervised where the answers have {expected}; please report this")
    padding, names = f"{min(pads)} to {max(pads)} of padding", f"{min(expected)} to {max(expected)} supervised"
    text = f"{len(pads)} images to {length:,} tokens | {padding}, {names}"
    return f"{text} | {len(batch.unreadable)} unreadable: {batch.unreadable[0]}" if batch.unreadable else text


# ---- the model


def check_model(found: PreFlight) -> str:
    from models.builder import PlantModel

    found.plant = PlantModel.from_config(found.config, found.data.class_names, found.device)
    shown = [sentence for sentence in found.plant.checks if "projection" in sentence or "train" in sentence]
    return f"{len(found.plant.checks)} assertions hold | {'; '.join(shown)}"


def check_steps(found: PreFlight) -> str:
    from models.trainer import build_trainer

    data = replace(found.data, train=found.rows, validation=None)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            found.config, output_dir=folder, max_steps=STEPS, eval_steps=None, report_to="none", warmup_steps=0.1
        )
        trainer = build_trainer(Run(config), found.plant, data)
        trainer.args.save_strategy = "no"
        trainer.plan_memory()
        trainer.train()
        found.steps = read_metrics(folder)
    losses = [step["loss"] for step in found.steps]
    chance = math.log(found.plant.model.get_input_embeddings().num_embeddings)
    is_random = 0.7 * chance < losses[0] < 1.4 * chance
    may_be_random = config.model in RANDOM_MODELS or Path(config.model).is_dir()
    pretrained = "0.5 to 2.0 is expected of a pretrained checkpoint"
    if not (PRETRAINED_LOSS[0] < losses[0] < PRETRAINED_LOSS[1] or (is_random and may_be_random)):
        raise UserError(f"starts at {losses[0]:.2f}; {pretrained}, about {chance:.1f} of random weights; check --model")
    expected = f"near ln(vocabulary) = {chance:.1f}, as expected of random weights" if is_random else pretrained
    return f"loss {', '.join(f'{loss:.2f}' for loss in losses)} ({expected})"


def check_leak(found: PreFlight) -> str:
    memory = [step["memory_gib"] for step in found.steps]
    if memory[-1] - memory[1] > LEAK_GIB and memory[-1] == max(memory):  # a CPU's goes up and down
        values = ", ".join(f"{value:.2f}" for value in memory)
        raise UserError(f"memory grew over {STEPS - 2} steps ({values} GiB) and would run out; please report this")
    peak = found.steps[-1]["peak_gib"]
    return f"{memory[0]:.2f} GiB after the first step, {memory[-1]:.2f} after the last | peak {peak:.2f}"


def check_time(found: PreFlight) -> str:
    batch_size = found.config.effective_batch_size
    seconds = statistics.median(step["seconds"] for step in found.steps[1:])
    steps = math.ceil(found.data.num_train / batch_size)
    epoch = f"about {seconds * steps / 60:.1f} minutes per epoch of {steps:,} steps"
    text = f"{batch_size / seconds:.2f} images/s | {epoch}"
    is_faster = found.device.type == "cuda" and found.config.compile == "auto"
    return f"{text} | a long run compiles its kernels and takes less" if is_faster else text


# In order, each with the check that must have passed.
CHECKS = [
    (check_config, None), (check_packages, None), (check_driver, "packages"), (check_device, "packages"),
    (check_disk_and_memory, "packages"),
    (check_data, "packages"), (check_class_names, "data"), (check_processor, "data device"),
    (check_lengths, "processor"),
    (check_sample, "processor"), (check_image_tokens, "sample"), (check_pixels, "sample"), (check_padding, "sample"),
    (check_model, "processor"), (check_steps, "model"), (check_leak, "steps"), (check_time, "steps"),
]  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())

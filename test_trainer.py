"""Pre-flight: are this machine, data and model ready for `python train.py` with the same flags?

    python test_trainer.py                   for the documented run
    python test_trainer.py --preset tiny     on any machine, about 20 seconds

Cheapest checks first, one line each. Exit status 1 if any failed. Nothing of a run is written.
"""

import ctypes
import dataclasses
import logging
import math
import statistics
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

from config.cli import parse_config
from config.training_config import RANDOM_MODELS
from utils.logging_utils import UserError, exit_status, report_errors, set_environment, setup_logging

STEPS = 6  # optimizer steps of the trial; the first two may still allocate
LEAK_GIB = 0.06  # growth over the later steps that is called a leak
PRETRAINED_LOSS = 0.05, 4.0  # around the documented 0.5 to 2.0: names differ in how hard they are
HUB_BYTES = 20e9  # of a 7B checkpoint on its way and the images
GIB = 2**30


def main(argv: list[str] | None = None) -> int:
    ready = SimpleNamespace(config=parse_config(argv, __doc__))
    set_environment()
    setup_logging()
    logging.getLogger("llava_plants").setLevel(logging.ERROR)  # the lines below say it
    with report_errors():
        return run_checks(ready)


def run_checks(ready) -> int:
    """One line for each check; the exit status."""
    failed = []
    for check in CHECKS:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        lacking = [need for need in NEEDS.get(check.__name__, ()) if not hasattr(ready, need)]
        if lacking:
            print(f"skip  {name}: needs the {lacking[0]} above", flush=True)
            continue
        try:
            print(f"ok    {name}: {check(ready)}", flush=True)
        except KeyboardInterrupt as stop:
            print(f"stop  {name}: interrupted", flush=True)
            return exit_status(stop)
        except Exception as error:
            failed.append(name)
            reason = str(error) if isinstance(error, (UserError, ImportError)) else f"{type(error).__name__}: {error}"
            print(f"FAIL  {name}: {reason}", flush=True)
    print(
        f"{len(failed)} of {len(CHECKS)} checks failed: {', '.join(failed)}"
        if failed
        else "ready: python train.py with the same flags"
    )
    return 1 if failed else 0


# ---- the machine


def check_config(ready) -> str:
    config = ready.config
    return (
        f"preset {config.preset}: {config.per_device_train_batch_size} x {config.gradient_accumulation_steps} images "
        "a step, "
        f"learning rate {config.learning_rate:g}, precision {config.mixed_precision}, 4-bit {config.load_in_4bit}, "
        f"clip {config.max_grad_norm:g}, recomputed activations {config.gradient_checkpointing}, auto batch "
        f"{config.auto_batch}"
    )


def check_packages(ready) -> str:
    try:
        from packaging.requirements import Requirement
    except ImportError:
        raise UserError("nothing is installed in this environment; run: pip install -r requirements.txt") from None
    lines = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line.partition("#")[0].strip()) for line in lines if line.partition("#")[0].strip()]
    have = {requirement.name: _installed(requirement.name) for requirement in wanted}
    missing = [name for name, installed in have.items() if installed is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed; run: pip install -r requirements.txt")
    ready.packages = have
    other = [
        f"{name} {have[name]} ({requirement.specifier} is pinned)"
        for name, requirement in zip(have, wanted)
        if not requirement.specifier.contains(have[name].partition("+")[0])
    ]
    return ", ".join(f"{name} {installed}" for name, installed in have.items()) + (
        "; others than tested: " + ", ".join(other)
    ) * bool(other)


def check_driver(ready) -> str:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; it needs no driver"
    needed = int(torch.version.cuda.split(".")[0])
    try:
        supported = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(supported))
    except OSError:
        return f"none installed; torch {torch.__version__} needs one for CUDA {needed} to use a GPU"
    if supported.value // 1000 < needed:
        raise UserError(
            f"the NVIDIA driver supports CUDA {supported.value / 1000:.1f}, torch {torch.__version__} needs "
            f"{torch.version.cuda}; "
            "install a newer driver"
        )
    return f"supports CUDA {supported.value / 1000:.1f}, torch needs {torch.version.cuda}"


def check_device(ready) -> str:
    import torch

    from runtime.device import choose_device, choose_precision

    device = choose_device(ready.config.model, ready.config.gpu_memory_fraction)
    ready.precision = choose_precision(ready.config.mixed_precision, device)
    ready.device = device
    if device.type != "cuda":
        return f"{device.type}, precision {ready.precision}"
    card = torch.cuda.get_device_properties(device)
    return (
        f"{card.name}, {card.total_memory / GIB:.1f} GiB ({ready.config.gpu_memory_fraction:.0%} to be used), "
        "compute capability "
        f"{card.major}.{card.minor}, precision {ready.precision}"
    )


def check_disk_and_memory(ready) -> str:
    import shutil

    import psutil

    memory = psutil.virtual_memory()
    free = shutil.disk_usage(".").free
    if free < 1e9:
        raise UserError(f"{free / 1e9:.1f} GB of disk are free here; a run needs at least 1 GB, make room")
    if "/" in ready.config.model and not Path(ready.config.model).is_dir():
        _check_cache(ready.config.model)
    return (
        f"{free / 1e9:.0f} GB of disk free here, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB of RAM "
        "free"
    )


# ---- the data


def check_data(ready) -> str:
    from data.dataset import build_datasets, sample_rows
    from utils.image_utils import ImageError, open_image

    data = build_datasets(ready.config)
    ready.images = data.num_train
    if ready.config.streaming:  # its first images stand for all
        data = dataclasses.replace(data, train=sample_rows(data.train))
    sizes, broken = [], []
    for index in range(4):
        try:
            image = open_image(data.train[index * (len(data.train) - 1) // 3]["image"])
            sizes.append(f"{image.width}x{image.height}")
        except ImageError as error:  # what share is broken is for the lengths below to say
            broken.append(str(error))
    if not sizes:
        raise UserError(f"none of four images can be opened: {broken[0]}")
    ready.data = data
    counts = f"{ready.images:,} train, {len(data.validation or ()):,} val, {len(data.test):,} test images"
    return f"{data.source}: {counts}; decoded {', '.join(sizes)} (width x height)" + f"; {broken[:1]}" * bool(broken)


def check_class_names(ready) -> str:
    from data.labels import parse_reply

    names = ready.data.class_names
    lost = [name for index, name in enumerate(names) if parse_reply(name, names) != index]
    if lost:
        raise UserError(f"{lost[0]!r} reads like another class apart from case and punctuation; rename one")
    shown = names if len(names) <= 4 else [*names[:3], "...", names[-1]]
    return f"{len(names)}: {', '.join(shown)}"


def check_processor(ready) -> str:
    from transformers import AutoProcessor

    from data.collator import PlantCollator
    from models.builder import build_processor
    from utils.tokenizer_utils import tokenizer_probe

    processor, prompt = build_processor(ready.config, ready.data.class_names)
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        if tokenizer_probe(AutoProcessor.from_pretrained(folder).tokenizer) != tokenizer_probe(processor.tokenizer):
            raise UserError(
                "the tokenizer reads a probe text differently after saving and loading; convert it to a fast tokenizer"
            )
    ready.collator = PlantCollator(processor, prompt, ready.data.class_names, ready.config.image_size)
    ready.processor, ready.prompt = processor, prompt
    return (
        f"prompt {prompt.prompt!r}, then {prompt.response_prefix!r}, the name, {prompt.end!r}; a probe survives saving"
    )


def check_lengths(ready) -> str:
    from data.dataset import check_unreadable_fraction, sample_rows
    from utils.image_utils import ImageError, fitted_size, read_image_size

    rows = sample_rows(ready.data.train)
    lengths, bad = [], []
    for row in rows:
        try:
            lengths.append(
                ready.collator.describe(row, fitted_size(read_image_size(row["image"]), ready.config.image_size)).length
            )
        except ImageError as error:
            bad.append(str(error))
    check_unreadable_fraction(bad, len(rows), ready.config.max_unreadable_fraction)
    quarters = statistics.quantiles(lengths, n=4) if len(lengths) > 1 else [lengths[0]] * 3
    return (
        f"{min(lengths):,} to {max(lengths):,} tokens, half between {quarters[0]:,.0f} and {quarters[2]:,.0f} "
        f"({len(lengths):,} images read"
        f"{f', {len(bad)} cannot be opened: {bad[0]}' if bad else ''})"
    )


# ---- one batch


def check_sample(ready) -> str:
    batch = ready.collator([ready.data.train[0]])
    sample, token = batch.samples[0], ready.processor.image_token
    ids = batch["input_ids"][0].tolist()
    decode = ready.processor.tokenizer.decode
    question = decode(ids[: sample.prompt_length]).replace(
        token * sample.image_tokens, f"{token} x {sample.image_tokens:,} "
    )
    ready.batch = batch
    return f"{question!r} -> learned: {decode(ids[sample.prompt_length : sample.length])!r}"


def check_image_tokens(ready) -> str:
    before = ready.prompt.text(ready.data.class_names[0]).count(ready.processor.image_token)
    after = int((ready.batch["input_ids"][0] == ready.processor.image_token_id).sum())
    return f"Number of image tokens: {before} (expanded to {after:,}, as many as feature rows)"


def check_pixels(ready) -> str:
    tile, patch = ready.processor.image_processor.crop_size["height"], ready.processor.patch_size
    return (
        f"pixel_values {tuple(ready.batch['pixel_values'].shape)} (images, tiles, channels, height, width), "
        f"{(tile // patch) ** 2} patches of {patch} x {patch} + 1 CLS a tile"
    )


def check_padding(ready) -> str:
    rows = ready.data.train.select(range(min(8, len(ready.data.train))))
    batch = ready.collator(list(rows))
    length = batch["input_ids"].shape[1]
    pads = [length - sample.length for sample in batch.samples]
    supervised = (batch["shift_labels"] != -100).sum(dim=1).tolist()
    expected = [sample.length - sample.prompt_length for sample in batch.samples]
    if supervised != expected:
        raise UserError(f"{supervised} tokens are supervised where the answers have {expected}; please report this")
    return (
        f"{len(batch.samples)} images to {length:,} tokens, {min(pads)} to {max(pads)} of padding, "
        f"{min(expected)} to {max(expected)} supervised"
    )


# ---- the model


def check_model(ready) -> str:
    from transformers import set_seed

    from models import builder

    set_seed(ready.config.seed)
    model = builder.build_model(ready.config, ready.processor, ready.device, ready.precision)
    found = builder.check_model(
        model, ready.processor, ready.prompt, ready.config.load_in_4bit, ready.config.trainable, ready.precision
    )
    ready.model = model
    return (
        f"{len(found)} assertions hold; "
        f"{'; '.join(sentence for sentence in found if 'projection' in sentence or 'learn' in sentence)}"
    )


def check_steps(ready) -> str:
    from models.builder import PlantModel
    from models.trainer import build_trainer
    from runtime.run_dir import Run
    from runtime.run_files import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(
            ready.config, output_dir=folder, max_steps=STEPS, save_steps=10 * STEPS, eval_steps=None, report_to="none"
        )
        plant = PlantModel(ready.model, ready.processor, ready.prompt, ready.collator, ready.precision, ready.device)
        trainer = build_trainer(Run(config), plant, dataclasses.replace(ready.data, validation=None))
        trainer.args.save_strategy = "no"
        trainer.plan_memory()
        trainer.train()
        ready.steps = read_metrics(folder)
    losses = [step["loss"] for step in ready.steps]
    chance = math.log(ready.model.get_input_embeddings().num_embeddings)
    random_weights = 0.7 * chance < losses[0] < 1.4 * chance
    may_be_random = ready.config.model in RANDOM_MODELS or Path(ready.config.model).is_dir()
    if not (PRETRAINED_LOSS[0] < losses[0] < PRETRAINED_LOSS[1] or (random_weights and may_be_random)):
        raise UserError(
            f"starts at {losses[0]:.2f}; 0.5 to 2.0 is expected of a pretrained checkpoint, about {chance:.1f} of "
            "random weights; "
            "is this the right checkpoint?"
        )
    kind = (
        f"near ln(vocabulary) = {chance:.1f}, as expected of random weights"
        if random_weights
        else "0.5 to 2.0 is expected of a pretrained checkpoint"
    )
    return f"loss {', '.join(f'{loss:.2f}' for loss in losses)} ({kind})"


def check_leak(ready) -> str:
    memory = [step["memory_gib"] for step in ready.steps]
    if memory[-1] - memory[1] > LEAK_GIB:
        raise UserError(
            f"memory grew over {STEPS - 2} steps ({', '.join(f'{value:.2f}' for value in memory)} GiB); a long run "
            "would use it up, "
            "please report this"
        )
    return (
        f"{memory[0]:.2f} GiB after the first step, {memory[-1]:.2f} after the last, peak "
        f"{ready.steps[-1]['peak_gib']:.2f}"
    )


def check_time(ready) -> str:
    seconds = statistics.median(step["seconds"] for step in ready.steps[1:])
    steps = math.ceil(ready.images / ready.config.effective_batch_size)
    return (
        f"{ready.config.effective_batch_size / seconds:.2f} photos/s, about {seconds * steps / 60:.1f} minutes an "
        f"epoch of {steps:,} steps"
        + (ready.device.type == "cuda" and ready.config.compile == "auto")
        * "; a long run compiles its kernels and takes less"
    )


def _check_cache(model: str) -> None:
    """Room for a checkpoint that is still to be downloaded."""
    import shutil

    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = next(folder for folder in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(cache).free
    if try_to_load_from_cache(model, "model.safetensors.index.json") is None and free < HUB_BYTES:
        raise UserError(
            f"{cache}: {free / 1e9:.0f} GB are free, {model} with the images takes {HUB_BYTES / 1e9:.0f}; make room, "
            "or set HF_HOME to another disk"
        )


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


CHECKS = (
    check_config,
    check_packages,
    check_driver,
    check_device,
    check_disk_and_memory,
    check_data,
    check_class_names,
    check_processor,
    check_lengths,
    check_sample,
    check_image_tokens,
    check_pixels,
    check_padding,
    check_model,
    check_steps,
    check_leak,
    check_time,
)
NEEDS = {
    "check_driver": ("packages",),
    "check_device": ("packages",),
    "check_disk_and_memory": ("packages",),
    "check_data": ("device",),
    "check_class_names": ("data",),
    "check_processor": ("data",),
    "check_lengths": ("processor",),
    "check_sample": ("processor",),
    "check_image_tokens": ("batch",),
    "check_pixels": ("batch",),
    "check_padding": ("batch",),
    "check_model": ("processor",),
    "check_steps": ("model",),
    "check_leak": ("steps",),
    "check_time": ("steps",),
}

if __name__ == "__main__":
    sys.exit(main())

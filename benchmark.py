"""How fast does this GPU train, and in how much memory? One table, on made images.

    python benchmark.py --model full                          random weights of the full-size shape: no download
    python benchmark.py --model full --preset native          images at their own size (--image 500x667)
    python benchmark.py --model full --against stock          and the plain Trainer with PEFT, in the same call
    python benchmark.py --preset tiny                         the same on the CPU, in seconds

Takes the flags of train.py but those of data, length and saving. Images are decoded and batched as in training; nothing
is kept. The table gives images/s as the median step (slowest - fastest), tokens/s, the share of the measured
matmul rate that is reached without counting recomputation, and the most memory that torch used and reserved.
"""

import contextlib
import dataclasses
import io
import math
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import NamedTuple

from config.cli import CommandLine
from config.training_config import ConfigError, TrainingConfig, option
from utils.logging_utils import logger, report_errors, set_environment, setup_logging

WARM_UP = 2  # steps that are not timed: libraries start, the optimizer makes its state
IMAGES = 64  # that are made, and used in turn
DATA_OPTIONS = (
    "dataset",
    "dataset_revision",
    "streaming",
    "train_on_val",
    "sample_fraction",
    "val_fraction",
    "test_fraction",
    "allow_missing",
    "max_unreadable_fraction",
)
RUN_OPTIONS = (
    "output_dir",
    "resume",
    "allow_changed",
    "num_train_epochs",
    "max_steps",
    "eval_steps",
    "early_stopping_patience",
    "early_stopping_min_gain",
    "save_steps",
    "save_total_limit",
    "max_skipped_steps",
    "report_to",
)
# Options of train.py that this script does not offer, and why.
REFUSED = dict.fromkeys(DATA_OPTIONS, "has no effect, images are generated; use --image WIDTHxHEIGHT")
REFUSED |= dict.fromkeys(RUN_OPTIONS, "has no effect, a benchmark runs --steps optimizer steps and saves nothing")


@dataclass(frozen=True)
class BenchmarkOptions:
    steps: int = option(6, "optimizer steps that are timed, after two that are not", low=2)
    image: str = option("500x667", "width x height of the generated images, before image_size")
    scoring: bool = option(True, "time scoring too, per_device_eval_batch_size images per forward pass")
    against: str = option("none", "stock: time the plain Trainer with PEFT too", choices=("none", "stock"))


def parse_benchmark(argv: list[str] | None = None) -> tuple[TrainingConfig, BenchmarkOptions, tuple[int, int]]:
    """(config, options, (width, height) of the generated images)."""
    line = CommandLine(argv, __doc__, BenchmarkOptions, refused=REFUSED)
    options, config = line.apply(BenchmarkOptions()), line.apply(TrainingConfig())
    size = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", options.image)
    if not size:
        line.problems.append(f"image={options.image}: width x height of 1 to 9999 pixels is needed, such as 500x667")
    line.exit_on_problems()
    return config, options, (int(size[1]), int(size[2]))


class Result(NamedTuple):
    """A row of the table."""

    system: str
    rates: list[float]  # images/s of each timed step
    peak: float  # bytes that torch had allocated at most
    reserved: float
    note: str


def main(argv: list[str] | None = None) -> int:
    config, options, image = parse_benchmark(argv)
    set_environment()
    setup_logging()
    with report_errors(ConfigError), tempfile.TemporaryDirectory() as folder:
        import torch

        from data.collator import PlantCollator
        from data.labels import CLASS_NAMES
        from models.builder import DTYPES, build_model, build_processor
        from models.memory import is_out_of_memory
        from models.throughput import FlopCounter, measure_matmul_rate
        from runtime.device import GIB, choose_device, choose_precision, peak_memory

        device = choose_device(config.model, config.gpu_memory_fraction)
        precision = choose_precision(config.mixed_precision, device)
        steps = WARM_UP + options.steps
        # A run of a few steps would not compile its kernels; what is measured here is a long one.
        compiles = config.compile == "auto" and device.type == "cuda" and config.trainable != "everything"
        compiles = (
            compiles and not config.lora_dropout and (config.auto_batch or config.per_device_train_batch_size > 1)
        )
        config = dataclasses.replace(
            config,
            output_dir=folder,
            max_steps=steps,
            eval_steps=None,
            save_steps=10 * steps,
            report_to="none",
            compile="true" if compiles else config.compile,
        )
        count = max(steps * config.effective_batch_size, 10 * config.per_device_eval_batch_size)
        rows = make_rows(image, len(CLASS_NAMES), count)
        processor, prompt = build_processor(config, CLASS_NAMES)
        collator = PlantCollator(processor, prompt, CLASS_NAMES, config.image_size)
        (sample,) = collator([rows[0]]).samples
        for line in describe(config, device, precision, image, sample):
            print(line, flush=True)
        began = time.perf_counter()
        model = build_model(config, processor, device, precision)
        host = peak_memory(torch.device("cpu")) / GIB
        print(f"model ready in {time.perf_counter() - began:.1f} s, host peak {host:.1f} GiB", flush=True)
        results, phases = [], None
        result, phases, data_rate = train_ours(config, model, processor, collator, rows, precision, device)
        results.append(result)
        if options.scoring:
            results.append(score_ours(config, model, collator, rows, precision, device))
        flops = FlopCounter(model)(sample.length, sample.tiles)
        if options.against == "stock":
            del model
            try:
                results.append(train_stock(config, processor, prompt, rows, CLASS_NAMES, precision, device))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning(
                    "stock Trainer: out of memory with %d images at a time; try fewer --per-device-train-batch-size",
                    config.per_device_train_batch_size,
                )
        report(results, phases, data_rate, flops, measure_matmul_rate(device, DTYPES[precision]), sample)
    return 0


def make_rows(image: tuple[int, int], classes: int, count: int):
    """Rows of JPEG images of this (W, H): smooth noise, so that they decode and resize like photographs."""
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    from data.dataset import ROW

    generator = np.random.default_rng(0)
    files = []
    for _ in range(IMAGES):
        coarse = Image.fromarray(generator.integers(0, 255, (image[1] // 8 + 1, image[0] // 8 + 1, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize(image, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    rows = [
        {"image": {"bytes": files[index % IMAGES], "path": None}, "label": index % classes, "id": f"made-{index}"}
        for index in range(count)
    ]
    return Dataset.from_list(rows, features=ROW)


def describe(config: TrainingConfig, device, precision: str, image, sample) -> list[str]:
    """The conditions."""
    from importlib.metadata import version

    import torch

    place = platform.processor() or platform.machine()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        has_tool = shutil.which(query[0])
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split() if has_tool else ["unknown"]
        place = f"{card.name}, {card.total_memory / 2**30:.1f} GiB, driver {' '.join(driver[:1])}, "
        place += f"CUDA {torch.version.cuda}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return [
        f"{place}; {packages}; Python {platform.python_version()}",
        f"{config.model}, {'nf4' if config.load_in_4bit else 'not quantized'}, {precision}, {config.trainable}, LoRA "
        f"r={config.lora_r}, dropout {config.lora_dropout:g}, {config.optim}, {config.effective_batch_size} images a "
        f"step, {config.num_workers} workers, compile {config.compile}",
        f"images {image[0]}x{image[1]}, image_size {config.image_size}: {sample.image_tokens:,} image tokens, "
        f"{sample.length:,} in all, {sample.tiles} tiles",
    ]


def train_ours(config, model, processor, collator, rows, precision, device):
    """(result, seconds of each phase of a step, images/s of the loader alone): the trainer as train.py builds it."""
    from data.dataset import PlantData
    from models.builder import PlantModel
    from models.trainer import build_trainer
    from runtime.run_dir import Run

    plant = PlantModel(model, processor, collator.prompt, collator, precision, device)
    data = PlantData(rows, None, rows, list(collator.class_names), "made images")
    trainer = build_trainer(Run(config), plant, data)
    trainer.args.save_strategy = "no"
    began = time.perf_counter()
    trainer.plan_memory(steps_left=math.inf)  # a run long enough to compile for
    clock = build_clock(device)
    trainer.add_callback(clock)
    with memory_of(device) as memory:
        trainer.train()
    print(f"first step after {clock.first_step - began:.1f} s, planning included", flush=True)
    data_rate = load_rate(trainer, config.effective_batch_size)
    note = f"{trainer.micro_batch_size} at a time"
    if trainer.fused:
        note += f", {sum(one.keep for one in trainer.fused)} of {len(trainer.fused)} layers keep activations"
    rates = [config.effective_batch_size / seconds for seconds in clock.steps[WARM_UP:]]
    trainer.accelerator.free_memory()
    return Result("this project", rates, *memory, note), clock.phases(), data_rate


def train_stock(config, processor, prompt, rows, names, precision, device) -> Result:
    """The plain Trainer on PEFT's own layers, at the configured micro-batch, everything else as documented."""
    import gc

    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from models.builder import DTYPES, build_base, set_trainable
    from utils.image_utils import fit_image, open_image

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    base = build_base(config, processor, device, DTYPES[precision])
    if config.load_in_4bit:
        base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = set_trainable(base, config.trainable, config.lora_r, config.lora_alpha, config.lora_dropout)
    end = len(processor.tokenizer(prompt.prompt).input_ids)

    def collate(some):
        images = [fit_image(open_image(row["image"]), config.image_size) for row in some]
        texts = [prompt.text(names[row["label"]]) for row in some]
        batch = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : end - 1 + int((batch["input_ids"][0] == processor.image_token_id).sum())] = -100
        return batch | {"labels": labels}

    clock = build_clock(device)
    with tempfile.TemporaryDirectory() as folder, memory_of(device) as memory:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            gradient_checkpointing=config.load_in_4bit,
            learning_rate=config.learning_rate,
            max_grad_norm=config.max_grad_norm,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=device.type == "cpu",
            optim=config.optim,
            max_steps=config.max_steps,
            dataloader_num_workers=config.num_workers,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rates = [config.effective_batch_size / seconds for seconds in clock.steps[WARM_UP:]]
    return Result("stock Trainer", rates, *memory, f"{config.per_device_train_batch_size} at a time")


def score_ours(config, model, collator, rows, precision, device) -> Result:
    """All class names on each image, images decoded as in an evaluation."""
    from models.builder import DTYPES
    from models.scoring import score_rows

    size = config.per_device_eval_batch_size
    some = rows.select(range(10 * size))
    rates = []
    with memory_of(device) as memory:
        began, done = None, 0
        scores = score_rows(model, collator, some, size, config.num_workers, DTYPES[precision])
        for count, _ in enumerate(scores, start=1):
            if count % size == 0:  # a batch's scores come all at once
                now = time.perf_counter()
                if count >= 3 * size:  # workers have started
                    rates.append((count - done) / (now - began))
                began, done = now, count
    return Result(f"scoring {len(collator.class_names)} names", rates, *memory, f"{size} at a time")


def build_clock(device):
    """A callback that times steps and their phases; it waits for the device at the ends of each."""
    from transformers import TrainerCallback

    from runtime.device import synchronize

    class Clock(TrainerCallback):
        def __init__(self):
            self.marks, self.steps, self.first_step = [], [], None

        def mark(self, *args, **kwargs):
            synchronize(device)
            self.marks.append(time.perf_counter())

        on_train_begin = on_step_begin = on_pre_optimizer_step = mark

        def on_step_end(self, *args, **kwargs):
            self.mark()
            self.steps.append(self.marks[-1] - self.marks[-4])
            self.first_step = self.first_step or self.marks[-1]

        def phases(self) -> dict[str, float]:
            """Median seconds of each phase of a timed step."""
            names = ("waiting for images", "forward, backward and clipping", "optimizer")
            gaps = [after - before for before, after in zip(self.marks, self.marks[1:])]
            return {name: statistics.median(gaps[3 * WARM_UP + index :: 3]) for index, name in enumerate(names)}

    return Clock()


@contextlib.contextmanager
def memory_of(device):
    """[peak allocated, peak reserved] bytes of what runs inside; of the process where there is no CUDA card."""
    import torch

    from runtime.device import peak_memory, reset_peak_memory

    found = []
    reset_peak_memory(device)
    yield found
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory(device)
    found += [peak_memory(device), reserved]


def load_rate(trainer, images: int) -> float:
    """Images/s that the training's loader gives when nothing waits for the device, its workers running."""
    batches = iter(trainer.get_train_dataloader())
    next(batches)
    began, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch.samples)
        if time.perf_counter() - began > 10:
            break
    return count / (time.perf_counter() - began)


def report(results: list[Result], phases: dict, data_rate: float, flops: float, matmul_rate: float, sample) -> None:
    print(
        f"matmul peak {matmul_rate / 1e12:.3g} TFLOP/s measured | {flops / 1e12:.3g} TFLOP/image without recomputation"
    )
    print(f"loader alone {data_rate:.1f} images/s")
    print("; ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in phases.items()))
    print(f"{'':22} {'images/s':>18} {'tokens/s':>9} {'share':>6} {'peak':>10} {'reserved':>10}")
    for result in results:
        middle = statistics.median(result.rates)
        spread = f"{middle:.2f} ({min(result.rates):.2f}-{max(result.rates):.2f})"
        share = f"{middle * flops / matmul_rate:.0%}" if "scoring" not in result.system else ""
        print(
            f"{result.system:22} {spread:>18} {middle * sample.length:9,.0f} {share:>6} {result.peak / 2**30:6.2f} GiB "
            f"{result.reserved / 2**30:6.2f} GiB  {result.note}"
        )


if __name__ == "__main__":
    sys.exit(main())

"""How fast does this GPU train, and in how much memory? One table, on generated images.

    python benchmark.py --model full                          random weights of the full-size shape: no download
    python benchmark.py --preset tiny                         the same on the CPU, in seconds
    python benchmark.py --model full --memory-limits 6,12,80 --points points.jsonl    training alone, within each limit
    python benchmark.py --points points.jsonl --picture speed.png                     which this draws
    torchrun --nproc-per-node 4 benchmark.py --model full --gradient-accumulation-steps 64    training alone

Takes the flags of train.py except those of data, length and saving; docs/speed.md shows more commands. Images are
decoded and batched as in training; nothing is saved. The table has images/s as the median step (slowest - fastest),
tokens/s, the share of the measured matmul rate that is reached without counting recomputation, and the peak memory that
torch allocated and reserved.
"""

import contextlib
import gc
import itertools
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Literal

from benchmarks.points import Result, append_result, read_points
from config.cli import DATA_FIELDS, CommandLine
from config.training_config import ConfigError, TrainingConfig, option
from runtime.run_dir import Run
from utils.logging_utils import UserError, logger, report_errors, set_environment, setup_logging

WARM_UP = 2  # steps that are not timed: libraries start, the optimizer allocates its state
MOST_HELD = 0.1  # GiB that libraries keep of a GPU's memory
LOAD_S = 10  # seconds for which the loader alone is timed, at most
# Options of train.py that this script does not offer, and why.
DATA_OPTIONS = (*DATA_FIELDS, "streaming", "train_on_val", "sample_fraction", "val_fraction", "test_fraction")
DATA_OPTIONS += ("class_balance", "augmentation")
RUN_OPTIONS = (
    "output_dir", "resume", "allow_changed", "num_train_epochs", "max_steps", "eval_steps", "early_stopping_patience",
    "early_stopping_min_gain", "save_steps", "save_total_limit", "max_skipped_steps", "report_to",
)  # fmt: skip
REFUSED = dict.fromkeys(DATA_OPTIONS, "has no effect, images are generated; use --image WIDTHxHEIGHT")
REFUSED |= dict.fromkeys(RUN_OPTIONS, "has no effect, a benchmark runs --steps optimizer steps and saves nothing")


@dataclass(frozen=True)
class BenchmarkOptions:
    steps: int = option(6, "optimizer steps that are timed, after two that are not", low=2)
    image: str = option("500x667", "width x height of the generated images, before image_size; several with commas")
    names: int = option(102, "class names; 102: the flowers', otherwise pairs of their words", low=2, high=20000)
    scoring: bool = option(True, "time scoring too, per_device_eval_batch_size images per forward pass")
    against: Literal["none", "stock"] = option("none", "stock: time the plain Trainer with PEFT too")
    memory_limits: str | None = option(None, "GiB of the GPU to train within, with commas; nothing else is timed")
    points: str | None = option(None, "file to which each row of the table is appended as a line of JSON")
    picture: str | None = option(None, "PNG to draw of the --points, images/s over memory; nothing is timed")


def parse_benchmark(argv: list[str] | None = None) -> tuple[TrainingConfig, BenchmarkOptions, list[tuple[int, int]]]:
    """(config, options, (width, height) of the generated images, which take turns)."""
    line = CommandLine(argv, __doc__, BenchmarkOptions, refused=REFUSED)
    options, config = line.apply(BenchmarkOptions()), line.apply(TrainingConfig())
    sizes = [re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", size) for size in options.image.split(",")]
    if not all(sizes):
        line.problems.append(f"image={options.image}: width x height of 1 to 9999 pixels is needed, such as 500x667")
    if not all(re.fullmatch(r"[1-9]\d*(\.\d+)?", limit) for limit in split_limits(options)):
        line.problems.append(f"memory_limits={options.memory_limits}: GiB are needed, such as 5.3,12")
    if options.picture and not options.points:
        line.problems.append(f"picture={options.picture}: needs --points FILE, which an earlier benchmark wrote")
    line.exit_on_problems()
    return config, options, [(int(size[1]), int(size[2])) for size in sizes if size]


def split_limits(options: BenchmarkOptions) -> list[str]:
    return options.memory_limits.split(",") if options.memory_limits else []


def main(argv: list[str] | None = None) -> int:
    config, options, sizes = parse_benchmark(argv)
    set_environment()
    setup_logging()
    interrupted = "run it again; --points has the rows that were measured"
    with report_errors(ConfigError, when_interrupted=interrupted), contextlib.ExitStack() as stack:
        if options.picture:
            from utils.plot_utils import plot_speed

            plot_speed(read_points(options.points), options.picture)
            return 0
        from runtime.distributed import init_distributed

        config = replace(config, max_steps=WARM_UP + options.steps, eval_steps=None, report_to="none")
        dist = stack.enter_context(init_distributed(config))
        folder = stack.enter_context(tempfile.TemporaryDirectory())  # each rank's own
        if not dist.is_main_process:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            options = replace(options, points=None)
        if dist.world_size > 1 or options.memory_limits:
            options = replace(options, scoring=False, against="none")
        if options.points:
            open(options.points, "a").close()  # what cannot be written fails now, not after a measurement
        measure(Run(replace(config, output_dir=folder), dist=dist), options, sizes)
    return 0


def measure(run: Run, options: BenchmarkOptions, sizes: list[tuple[int, int]]) -> None:
    """Print the table. With several ranks its rates are those of all, and its memory is rank 0's."""
    import torch
    from bitsandbytes.optim import GlobalOptimManager

    from benchmarks.generated import make_data, make_names
    from models.builder import PlantModel
    from models.throughput import FlopCounter, measure_matmul_rate
    from runtime.device import GIB, collect_memory, peak_memory

    config, device, results = run.config, run.dist.device, []
    print(machine := describe_machine(device), flush=True)
    class_names = make_names(options.names)
    data = make_data(sizes, class_names, config.max_steps * config.effective_batch_size)

    def add(result: Result) -> None:
        results.append(result)
        if options.points:
            append_result(options.points, result, options.image, machine)

    for limit in [float(limit) for limit in split_limits(options)] or [None]:
        limit_memory(limit, run.dist)
        began = time.perf_counter()
        try:
            plant = PlantModel.from_config(config, class_names, device)
            tokens, tiles = describe_model(run, plant, data.train.select(range(len(sizes))), options.image)
            host = peak_memory(torch.device("cpu")) / GIB
            print(f"model ready in {time.perf_counter() - began:.1f} s | host peak {host:.1f} GiB", flush=True)
            flops, dtype = FlopCounter(plant.model)(tokens, tiles), plant.dtype
            add(train_ours(run, plant, data)._replace(limit=limit))
        except UserError as error:
            gc.unfreeze()  # what training froze, and did not come to thaw, would never be collected
            add(Result(name_ours(run), [], 0, 0, str(error), limit))
        else:
            if options.scoring:
                add(score_ours(plant, data.train))
            if options.against == "stock":
                add(train_stock(run, plant, data))
        plant = None  # the GPU has room for one
        GlobalOptimManager.get_instance().initialize()  # where transformers keeps embeddings beside 8-bit optimizers
        collect_memory(device)
    if not any(result.rates for result in results):
        raise UserError(results[-1].note)
    report(results, flops, measure_matmul_rate(device, dtype) * run.dist.world_size, tokens)


def limit_memory(limit: float | None, dist) -> None:
    """Let tensors of this process take so many GiB of the GPU, or all it has; a plan leaves FRAGMENTATION besides.

    Raises UserError where nothing can be limited.
    """
    import torch

    from models.memory import FRAGMENTATION

    if limit is None:
        return
    if dist.world_size > 1 or dist.device.type != "cuda":
        raise UserError("--memory-limits: needs a CUDA GPU and one rank; leave it out, or start without torchrun")
    if (held := torch.cuda.memory_allocated(dist.device) / 2**30) > MOST_HELD:
        logger.warning(f"{held:.1f} GiB of what was measured before are still in use; give this limit its own call")
    total = torch.cuda.get_device_properties(dist.device).total_memory
    share = limit * 2**30 / total / (1 - FRAGMENTATION)
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), dist.device)


def describe_model(run: Run, plant, rows, images: str) -> tuple[int, int]:
    """(tokens, tiles) of one of the rows, on average. Prints what is measured."""
    config = run.config
    samples = [plant.collator([row]).samples[0] for row in rows]
    tokens, image_tokens, tiles = (
        round(statistics.mean(getattr(sample, name) for sample in samples))
        for name in ("length", "image_tokens", "tiles")
    )
    print(
        f"{config.model} | {plant.describe(config.trainable, config.load_in_4bit)} | LoRA r={config.lora_r}, "
        f"dropout {config.lora_dropout:g} | {config.optim} | global batch size {config.effective_batch_size} | "
        f"{config.num_workers} workers | {run.dist.world_size} ranks\n"
        f"images {images} | image_size {config.image_size} | {image_tokens:,} image tokens, "
        f"{tokens:,} tokens in all | {tiles} tiles"
    )
    return tokens, tiles


def describe_machine(device) -> str:
    import torch
    from torch.utils import collect_env

    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        driver = collect_env.get_nvidia_driver_version(collect_env.run)  # None without nvidia-smi
        name = f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, driver {driver}, CUDA {torch.version.cuda}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return f"{name} | {packages}, Python {platform.python_version()}"


def train_ours(run: Run, plant, data) -> Result:
    """The trainer as train.py builds it. Prints the time to its first step, of its loader and of each phase."""
    from models.memory import Plan
    from models.trainer import build_trainer

    trainer = build_trainer(run, plant, data)
    trainer.args.save_strategy = "no"
    began = time.perf_counter()
    trainer.plan_memory(steps_left=math.inf)  # a run long enough to compile for
    rates, marks = time_training(trainer, run.config.effective_batch_size)
    memory = read_memory(plant.device)  # before the loader's workers take some
    print(f"first step after {marks[3] - began:.1f} s, planning included", flush=True)
    print(f"loader alone {load_rate(trainer):.1f} images/s")
    gaps = [1000 * (end - start) for start, end in itertools.pairwise(marks[3 * WARM_UP :])]
    phases = enumerate(("waiting for images", "forward, backward and clipping", "optimizer"))
    print(" | ".join(f"{name} {statistics.median(gaps[index::3]):.0f} ms" for index, name in phases))
    kept, offloaded = (sum(getattr(layer, name) for layer in trainer.fused) for name in ("keep", "offload"))
    plan = Plan(trainer.micro_batcher.size, kept, offloaded, memory[0])
    trainer.accelerator.free_memory()
    return Result(name_ours(run), rates, *memory, plan.describe(len(trainer.fused)))


def name_ours(run: Run) -> str:
    views, matmul = run.config.views, run.config.matmul
    return "this project" + (", base view" if views == "base" else "") + (", FP8" if matmul == "fp8" else "")


def train_stock(run: Run, plant, data) -> Result:
    """The plain Trainer, in place of the model of `plant`."""
    from benchmarks.stock_trainer import build_stock_trainer
    from runtime.device import collect_memory, is_out_of_memory

    plant.model = None  # the GPU has room for one model
    collect_memory(plant.device)
    rates, note = [], f"micro-batch {run.config.per_device_train_batch_size}"
    try:
        trainer = build_stock_trainer(run.config, plant, data.train)
        rates, _ = time_training(trainer, run.config.effective_batch_size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        note = f"out of memory with {note}; lower --per-device-train-batch-size"
    return Result("stock Trainer", rates, *read_memory(plant.device), note)


def score_ours(plant, rows) -> Result:
    """The log-likelihoods of all class names, or the top 5 of many, images decoded as in an evaluation."""
    from models.search import MAX_SCORED, Goal
    from runtime.device import reset_peak_memory

    size, rates, forwards, found = plant.micro_batcher.size, [], [], []
    rows = rows.select([index % len(rows) for index in range(10 * size)])
    is_searched = len(plant.class_names) > MAX_SCORED
    counter = plant.base.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    reset_peak_memory(plant.device)
    began = time.perf_counter()
    for batch, (scores, _) in enumerate(plant.search(rows, Goal(5)) if is_searched else plant.score(rows)):
        now = time.perf_counter()
        if batch >= 2:  # workers have started
            rates.append(len(scores) / (now - began))
        began = now
        found += [result for _, result in scores]
    counter.remove()
    system, note = f"scoring {len(plant.class_names)} names", f"batch {size}, {len(forwards) / 10:.1f} forwards of each"
    if is_searched:
        system = f"top 5 of {len(plant.class_names)} names"
        expanded = statistics.median(result.expanded for result in found)
        confidence = statistics.median(result.low[0] for result in found)
        note += f"; median of an image: {expanded:.0f} prefixes expanded, confidence {confidence:.2f}"
    return Result(system, rates, *read_memory(plant.device), note)


def time_training(trainer, batch_size: int) -> tuple[list[float], list[float]]:
    """(images/s of each timed step; seconds at the start, then when each step's images, gradients and it are there)."""
    from transformers import TrainerCallback

    from runtime.device import reset_peak_memory, synchronize

    marks, device = [], trainer.args.device

    class Clock(TrainerCallback):
        def mark(self, *args, **kwargs):
            synchronize(device)
            marks.append(time.perf_counter())

        on_train_begin = on_step_begin = on_pre_optimizer_step = on_step_end = mark

    trainer.add_callback(Clock)
    reset_peak_memory(device)
    trainer.train()
    return [batch_size / (end - start) for start, end in itertools.pairwise(marks[3 * WARM_UP :: 3])], marks


def read_memory(device) -> tuple[float, float]:
    """(allocated, reserved) bytes, the most since reset_peak_memory; the process's resident size without CUDA."""
    import torch

    from runtime.device import peak_memory

    peak = peak_memory(device)
    return peak, torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak


def load_rate(trainer) -> float:
    """Images/s of the loaders of all ranks when nothing waits for the device, once their workers run."""
    batches = iter(trainer.get_train_dataloader())
    next(batches)
    began, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch.samples)
        if time.perf_counter() - began > LOAD_S:
            break
    return trainer.dist.world_size * count / (time.perf_counter() - began)


def report(results: list[Result], flops: float, matmul_rate: float, tokens: int) -> None:
    """`flops` and `tokens` are those of an image, `matmul_rate` is in FLOP/s."""
    print(f"matmul {matmul_rate / 1e12:.3g} TFLOP/s measured | {flops / 1e12:.3g} TFLOP/image without recomputation")
    print(f"{'':24} {'images/s':>18} {'tokens/s':>9} {'share':>6} {'peak':>10} {'reserved':>10}")
    for result in results:
        limit = "" if result.limit is None else f"within {result.limit:g} GiB: "
        if not result.rates:
            print(f"{result.system:24} {'-':>18} {limit}{result.note}")
            continue
        share = "" if "names" in result.system else f"{result.rate * flops / matmul_rate:.0%}"
        memory = f"{result.peak / 2**30:6.2f} GiB {result.reserved / 2**30:6.2f} GiB"
        images = f"{result.rate:.2f} ({min(result.rates):.2f}-{max(result.rates):.2f})"
        speed = f"{images:>18} {result.rate * tokens:9,.0f} {share:>6}"
        print(f"{result.system:24} {speed} {memory}  {limit}{result.note}")


if __name__ == "__main__":
    sys.exit(main())

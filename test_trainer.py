"""Pre-flight: are this machine, data and model ready for `python train.py` with the same flags?

    python test_trainer.py                   for the documented run
    python test_trainer.py --preset tiny     on any machine, about 20 seconds

Cheapest checks first, one line each. Exit status 1 if any failed. Writes no run.
"""

import ctypes
import itertools
import math
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from config.cli import parse_config
from config.training_config import RANDOM_MODELS, TrainingConfig, format_value
from runtime.run_dir import Run
from runtime.run_files import read_metrics
from utils.logging_utils import UserError, exit_status, logger, report_errors, set_environment, setup_logging

STEPS = 6  # optimizer steps of the trial; the first two may still allocate
LEAK_GIB = 0.06  # growth over the later steps that counts as a leak
PRETRAINED_LOSS = 0.05, 4.0  # around the documented 0.5 to 2.0: class names differ in difficulty
HUB_BYTES = 20e9  # of a 7B checkpoint and the images
RUN_BYTES = 1e9  # of disk that any run needs
GIB = 2**30
SHOWN = (
    "preset", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "max_grad_norm",
    "mixed_precision", "load_in_4bit", "gradient_checkpointing", "auto_batch",
)  # fmt: skip
# In order, each with the checks that must have passed.
CHECKS = {
    "config": "", "packages": "", "driver": "packages", "device": "packages", "disk and memory": "packages",
    "data": "packages", "class names": "data", "processor": "data device", "lengths": "processor",
    "sample": "processor", "image tokens": "sample", "pixels": "sample", "padding": "sample",
    "model": "processor", "steps": "model", "leak": "steps", "time": "steps",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    config = parse_config(argv, __doc__)
    if os.environ.get("RANK", "0") != "0" and "WORLD_SIZE" in os.environ:  # rank 0 reports for all
        return 0
    set_environment()
    setup_logging()
    logger.setLevel("ERROR")  # the lines below say it
    with report_errors():
        return PreFlight(replace(config, sharding="none")).run()  # one rank, which has all weights


@dataclass
class PreFlight:
    """The checks, each a method that returns what it found in words, or raises; what later ones need is kept."""

    config: TrainingConfig

    def run(self) -> int:
        """Print a line for each check; returns the exit status."""
        passed, failed = [], []
        for name, needs in CHECKS.items():
            if missing := [need for need in needs.split() if need not in passed]:
                print(f"skip  {name}: needs the {missing[0]} above", flush=True)
                continue
            try:
                line = f"ok    {name}: {getattr(self, 'check_' + name.replace(' ', '_'))()}"
                passed.append(name)
            except KeyboardInterrupt as stop:
                print(f"stop  {name}: interrupted", flush=True)
                return exit_status(stop)
            except Exception as error:
                kind = "" if isinstance(error, (UserError, ImportError)) else f"{type(error).__name__}: "
                line = f"FAIL  {name}: {kind}{error}"
                failed.append(name)
            print(line, flush=True)
        if failed:
            print(f"{len(failed)} of {len(CHECKS)} checks failed: {', '.join(failed)}")
            return 1
        print("ready: python train.py with the same flags")
        return 0

    # ---- the machine

    def check_config(self) -> str:
        return " | ".join(f"{name} {format_value(getattr(self.config, name))}" for name in SHOWN)

    def check_packages(self) -> str:
        try:
            from packaging.requirements import Requirement
        except ImportError:
            raise UserError("no packages in this environment; run: pip install -r requirements.txt") from None
        installed, untested, missing = [], [], []
        lines = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
        for requirement in map(Requirement, filter(None, (line.partition("#")[0].strip() for line in lines))):
            try:
                found = version(requirement.name)
            except PackageNotFoundError:
                missing.append(requirement.name)
                continue
            installed.append(f"{requirement.name} {found}")
            if not requirement.specifier.contains(found.partition("+")[0]):
                untested.append(f"{installed[-1]} ({requirement.specifier} is pinned)")
        if missing:
            raise UserError(f"{', '.join(missing)} not installed; run: pip install -r requirements.txt")
        return ", ".join(installed) + (f" | not the tested versions: {', '.join(untested)}" if untested else "")

    def check_driver(self) -> str:
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

    def check_device(self) -> str:
        import torch

        from runtime.device import choose_device, choose_precision

        share = self.config.gpu_memory_fraction
        self.device = choose_device(self.config.model, share)
        precision = f"precision {choose_precision(self.config.mixed_precision, self.device)}"
        if self.device.type != "cuda":
            return f"{self.device.type} | {precision}"
        gpu = torch.cuda.get_device_properties(self.device)
        memory, capability = f"{gpu.total_memory / GIB:.1f} GiB", f"compute capability {gpu.major}.{gpu.minor}"
        return f"{gpu.name} | {memory}, {share:.0%} to be used | {capability} | {precision}"

    def check_disk_and_memory(self) -> str:
        import psutil
        from huggingface_hub.constants import HF_HUB_CACHE

        from models.loading import is_cached
        from runtime.atomic import require_disk_space

        model, ram = self.config.model, psutil.virtual_memory()
        runs = self.config.output_dir or "runs"
        free = require_disk_space(runs, RUN_BYTES, "a run needs at least", "use another --output-dir")
        if "/" in model and not Path(model).is_dir() and not is_cached(model, self.config.model_revision):
            require_disk_space(HF_HUB_CACHE, HUB_BYTES, f"{model} and the images need", "set HF_HOME to another disk")
        memory = f"{ram.available / GIB:.1f} of {ram.total / GIB:.1f} GiB of RAM free"
        return f"{free / 1e9:.0f} GB of disk free for the run | {memory}"

    # ---- the data

    def check_data(self) -> str:
        from data.dataset import build_datasets, sample_rows

        data = self.data = build_datasets(self.config)
        self.rows = sample_rows(data.train)  # which stand for all
        counts = f"{data.num_train:,} train, {len(data.validation or ()):,} val, {len(data.test):,} test images"
        lines = [f"{data.source}: {counts}", *data.notes, *(f"warning: {warning}" for warning in data.warnings)]
        return "\n      ".join(lines)

    def check_class_names(self) -> str:
        from data.labels import parse_reply

        names = self.data.class_names
        for index, name in enumerate(names):
            if parse_reply(name, names) != index:
                raise UserError(f"{name!r} reads like another class apart from case and punctuation; rename one")
        return f"{len(names)}: {', '.join(names if len(names) <= 4 else [*names[:3], '...', names[-1]])}"

    def check_processor(self) -> str:
        from transformers import AutoProcessor

        from data.collator import PlantCollator
        from models.builder import build_processor
        from utils.tokenizer_utils import tokenizer_probe

        processor, prompt = build_processor(self.config, self.data.class_names)
        with tempfile.TemporaryDirectory() as folder:
            processor.save_pretrained(folder)
            saved = AutoProcessor.from_pretrained(folder).tokenizer
        if tokenizer_probe(saved) != tokenizer_probe(processor.tokenizer):
            raise UserError("saving and loading changes what the tokenizer reads; convert it to a fast tokenizer")
        self.collator = PlantCollator(processor, prompt, self.data.class_names, self.config.image_size)
        turn = f"prompt {prompt.prompt!r}, then {prompt.response_prefix!r}, the class name, {prompt.eos!r}"
        return f"{turn} | the tokenizer survives saving"

    def check_lengths(self) -> str:
        """As far as the headers of images tell."""
        from data.dataset import check_unreadable_fraction, sample_rows
        from utils.image_utils import ImageError, read_image_size

        lengths, sizes, unreadable = [], [], []
        others = [sample_rows(rows) for rows in (self.data.validation, self.data.test) if rows]
        for rows in (self.rows, *others):
            faults = []
            for row in rows:
                try:
                    height, width = read_image_size(row["image"])
                except ImageError as error:
                    faults.append(f"{error}")
                    continue
                sizes.append(f"{width}x{height}")
                lengths.append(self.collator.describe(row, (height, width)).length)
            check_unreadable_fraction(faults, len(rows), self.config.max_bad_fraction)
            unreadable += faults
        if not lengths:
            raise UserError(f"none of {len(unreadable)} images can be opened: {unreadable[0]}")
        low, _, high = statistics.quantiles(lengths, n=4) if len(lengths) > 1 else lengths * 3
        text = f"{min(lengths):,} to {max(lengths):,} tokens, half between {low:,.0f} and {high:,.0f}"
        text += f" | {len(lengths):,} images read, width x height {', '.join(list(dict.fromkeys(sizes))[:4])}"
        return text + describe_unreadable(unreadable)

    # ---- one batch

    def check_sample(self) -> str:
        from evaluation.verify import first_readable

        processor = self.collator.processor
        self.batch = self.collator(first_readable(self.collator, self.rows, 1))
        (sample,), ids = self.batch.samples, self.batch["input_ids"][0]
        expanded, token = processor.image_token * sample.image_tokens, processor.image_token
        prompt = processor.tokenizer.decode(ids[: sample.prompt_length])
        prompt = prompt.replace(expanded, f"{token} x {sample.image_tokens:,} ")
        return f"{prompt!r} -> supervised: {processor.tokenizer.decode(ids[sample.prompt_length :])!r}"

    def check_image_tokens(self) -> str:
        processor = self.collator.processor
        before = self.collator.texts[self.batch.samples[0].label].count(processor.image_token)
        after = int((self.batch["input_ids"][0] == processor.image_token_id).sum())
        return f"Number of image tokens: {before} (expanded to {after:,}, as many as feature rows)"

    def check_pixels(self) -> str:
        processor = self.collator.processor
        patches = (processor.image_processor.crop_size["height"] // processor.patch_size) ** 2
        shape = f"pixel_values {tuple(self.batch['pixel_values'].shape)} (images, tiles, channels, height, width)"
        cls = " + 1 CLS" if processor.vision_feature_select_strategy == "default" else ""
        return f"{shape} | {patches} patches of {processor.patch_size} x {processor.patch_size}{cls} per tile"

    def check_padding(self) -> str:
        batch = self.collator(list(itertools.islice(self.rows, 8)))
        length = batch["input_ids"].shape[1]
        pads = [length - sample.length for sample in batch.samples]
        supervised = (batch["shift_labels"] != -100).sum(dim=1).tolist()
        expected = [sample.length - sample.prompt_length for sample in batch.samples]
        if supervised != expected:
            raise UserError(f"{supervised} tokens are supervised where the answers have {expected}; please report this")
        padding, names = f"{min(pads)} to {max(pads)} of padding", f"{min(expected)} to {max(expected)} supervised"
        return f"{len(pads)} images to {length:,} tokens | {padding}, {names}{describe_unreadable(batch.unreadable)}"

    # ---- the model

    def check_model(self) -> str:
        from models.builder import PlantModel

        self.plant = PlantModel.from_config(self.config, self.data.class_names, self.device)
        shown = [sentence for sentence in self.plant.checks if "projection" in sentence or "train" in sentence]
        return f"{len(self.plant.checks)} assertions hold | {'; '.join(shown)}"

    def check_steps(self) -> str:
        from models.trainer import build_trainer

        data = replace(self.data, train=self.rows, validation=None)
        trial = dict(max_steps=STEPS, eval_steps=None, early_stopping_patience=None, report_to="none", warmup_steps=0.1)
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(Run(replace(self.config, output_dir=folder, **trial)), self.plant, data)
            trainer.args.save_strategy = "no"
            trainer.plan_memory()
            trainer.train()
            self.steps = read_metrics(folder)
        losses = [step["loss"] for step in self.steps]
        chance = math.log(self.plant.model.get_input_embeddings().num_embeddings)
        is_random = 0.7 * chance < losses[0] < 1.4 * chance
        may_be_random = self.config.model in RANDOM_MODELS or Path(self.config.model).is_dir()
        expected = "0.5 to 2.0 is expected of a pretrained checkpoint"
        if not (PRETRAINED_LOSS[0] < losses[0] < PRETRAINED_LOSS[1] or (is_random and may_be_random)):
            problem = f"starts at {losses[0]:.2f}; {expected}, about {chance:.1f} of random weights"
            raise UserError(f"{problem}; check --model")
        if is_random:
            expected = f"near ln(vocabulary) = {chance:.1f}, as expected of random weights"
        return f"loss {', '.join(f'{loss:.2f}' for loss in losses)} ({expected})"

    def check_leak(self) -> str:
        memory = [step["memory_gib"] for step in self.steps]
        if memory[-1] - memory[1] > LEAK_GIB and memory[-1] == max(memory):  # a CPU's goes up and down
            values = ", ".join(f"{value:.2f}" for value in memory)
            raise UserError(f"memory grew over {STEPS - 2} steps ({values} GiB) and would run out; please report this")
        peak = self.steps[-1]["peak_gib"]
        return f"{memory[0]:.2f} GiB after the first step, {memory[-1]:.2f} after the last | peak {peak:.2f}"

    def check_time(self) -> str:
        batch_size = self.config.effective_batch_size
        seconds = statistics.median(step["seconds"] for step in self.steps[1:])
        steps = math.ceil(self.data.num_train / batch_size)
        epoch = f"{seconds * steps:.1f} s" if seconds * steps < 60 else f"{seconds * steps / 60:.1f} minutes"
        text = f"{batch_size / seconds:.2f} images/s | about {epoch} per epoch of {steps:,} steps"
        is_faster = self.device.type == "cuda" and self.config.compile == "auto"
        return f"{text} | a long run compiles its kernels and takes less" if is_faster else text


def describe_unreadable(reasons: list[str]) -> str:
    return f" | {len(reasons)} unreadable: {reasons[0]}" if reasons else ""


if __name__ == "__main__":
    sys.exit(main())

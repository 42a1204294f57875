"""What accompanies a run: metrics.jsonl, step lines, loss.png, early stopping, the progress bar.

No callback changes the model.
"""

import contextlib
import gc
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Sequence

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from models.throughput import measure_matmul_rate
from runtime.device import GIB, collect_memory, memory_in_use, peak_memory
from runtime.run_files import append_metrics, read_metrics
from utils.logging_utils import logger, skip_failure
from utils.plot_utils import plot_training

SPIKE_HISTORY, SPIKE_MIN_HISTORY = 50, 10  # steps whose median a value is compared with
# A spike is above so many times the median, and above it by so much. Late in the tiny run, batches with one hard image
# have 13 times the median gradient norm.
SPIKES = {"loss": (2.0, 0.5), "grad_norm": (20.0, 0.0)}


class RunLog(TrainerCallback):
    """An object per step in metrics.jsonl, a line per `logging_steps`, loss.png at evaluations and at the end."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.window: list[dict] = []  # steps since the last line
        self.history = {name: deque(maxlen=SPIKE_HISTORY) for name in SPIKES}
        self.matmul_rate: float | None = None  # FLOP/s of all GPUs; not measured on the CPU

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and args.device.type == "cuda":
            dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
            with contextlib.suppress(torch.OutOfMemoryError):
                self.matmul_rate = measure_matmul_rate(args.device, dtype) * args.world_size
        state.compute_steps(args, state.max_steps)  # --eval-steps and --save-steps of now, not the checkpoint's
        state.log_history.extend(self.trainer.backfilled_evals)
        self.first_step = state.global_step
        self.train_began = self.step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        run = self.trainer.run
        run.end_phase("steps" if "first step" in run.seconds else "first step")
        now = time.perf_counter()
        step = self.trainer.step_checks.metrics | {
            "seconds": round(now - self.step_began, 4),
            "memory_gib": round(memory_in_use(args.device) / GIB, 4),
            "peak_gib": round(peak_memory(args.device) / GIB, 4),
        }
        self.step_began = now
        if state.is_world_process_zero:
            append_metrics(run.folder, step)
            self.warn_of_spikes(step)
            self.window.append(step)
            if state.global_step % args.logging_steps == 0 or state.global_step in (1, state.max_steps):
                logger.info("%s", self.format_line(state))
                self.window.clear()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.trainer.run.end_phase("evaluations")
        if state.is_world_process_zero:
            append_metrics(self.trainer.run.folder, {"step": state.global_step} | metrics)
            logger.info(
                f"eval | step {state.global_step} | val loss {metrics['eval_loss']:.4f} | "
                f"val top-1 {metrics['eval_top1']:.3f} | val top-5 {metrics['eval_top5']:.3f}"
            )
            self.plot()
        self.step_began = time.perf_counter()  # an evaluation is not part of the next step's time

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            lines = read_metrics(self.trainer.run.folder)
            skipped = Counter(line["skipped"] for line in lines if "skipped" in line)
            if skipped:
                kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
                logger.warning(f"{skipped.total()} of {state.global_step} steps were skipped ({kinds})")
            if self.trainer.eval_dataset is None:  # otherwise the last evaluation plots it
                self.plot()

    def plot(self) -> None:
        path = self.trainer.run.folder / "loss.png"
        with skip_failure(path):
            plot_training(read_metrics(path.parent), path)

    def format_line(self, state) -> str:
        seconds, images, image_tokens, flops = (
            sum(step[name] for step in self.window) for name in ("seconds", "images", "image_tokens", "flops")
        )
        last = self.window[-1]
        losses = [step["loss"] for step in self.window if step["loss"] is not None]
        done, to_do = state.global_step - self.first_step, state.max_steps - state.global_step
        minutes_left = (time.perf_counter() - self.train_began) / done * to_do / 60
        parts = [
            f"step {state.global_step}/{state.max_steps}",
            f"loss {statistics.fmean(losses):.4f}" if losses else "loss skipped",
            f"lr {last['learning_rate']:.2e}",
            f"grad norm {last.get('skipped') if last['grad_norm'] is None else format(last['grad_norm'], '.3g')}",
            f"{images / seconds:.1f} images/s",
            f"{image_tokens / images:,.0f} image tokens/image",
            f"peak {last['peak_gib']:.2f} GiB",
            f"{minutes_left:.1f} min left",
        ]
        if self.matmul_rate is not None:
            parts.insert(-2, f"{flops / seconds / self.matmul_rate:.0%} of matmul peak")
        return " | ".join(parts)

    def warn_of_spikes(self, step: dict) -> None:
        """Compare loss and gradient norm with their medians before; those of a skipped step are None."""
        for name, (factor, margin) in SPIKES.items():
            value, history = step[name], self.history[name]
            if value is None:
                continue
            median = statistics.median(history) if len(history) >= SPIKE_MIN_HISTORY else math.inf
            if value > max(factor * median, median + margin):
                clipped = f"; clipped to {self.trainer.args.max_grad_norm:g}" if name == "grad_norm" else ""
                logger.warning(
                    f"step {step['step']}: {'loss' if name == 'loss' else 'gradient norm'} {value:.3f} is a spike, the "
                    f"last {len(history)} steps had a median of {median:.3f}{clipped}"
                )
            history.append(value)


class EarlyStopping(TrainerCallback):
    """Stops after `patience` evaluations in a row without a gain of `min_gain` in top-1 over the best before them.

    With `min_gain` None a gain must exceed what `num_images` validation images can resolve. Judged from the log history
    alone, which a checkpoint keeps, so a resumed run stops where an undisturbed one would.
    """

    def __init__(self, patience: int, min_gain: float | None, num_images: int):
        self.patience = patience
        self.min_gain = min_gain
        self.num_images = num_images

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps and self.is_over(state.log_history):
            logger.info(
                f"eval | step {state.global_step} | early stopping: no gain in val top-1 beyond chance in the last "
                f"{self.patience} evaluations"
            )
            control.should_training_stop = control.should_save = True

    def is_over(self, history: Sequence[dict]) -> bool:
        """Whether the run has stopped by this log history; one that was killed after it stopped is over too."""
        accuracies = [entry["eval_top1"] for entry in history if "eval_top1" in entry]
        best, waited = (accuracies or [0.0])[0], 0
        for top1 in accuracies[1:]:
            required = resolvable_gain(best, self.num_images) if self.min_gain is None else self.min_gain
            if top1 > best and top1 - best >= required:
                best, waited = top1, 0
            else:
                waited += 1
        return waited >= self.patience


def resolvable_gain(top1: float, num_images: int) -> float:
    """The standard error of a top-1 accuracy over so many images, at least one image."""
    return max(math.sqrt(top1 * (1 - top1) / num_images), 1 / num_images)


class MemoryCollector(TrainerCallback):
    """Collects garbage at the ends of epochs and evaluations; inside a step it would cost more than it frees."""

    def on_train_begin(self, args, state, control, **kwargs):
        gc.freeze()  # imported modules are not scanned again: a collection would take 0.3 s

    def on_train_end(self, args, state, control, **kwargs):
        gc.unfreeze()

    def on_epoch_end(self, args, state, control, **kwargs):
        collect_memory(args.device)

    on_evaluate = on_epoch_end


class ProgressBar(ProgressCallback):
    """transformers' progress bar without its printed dictionaries."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass

    on_prediction_step = on_evaluate = on_predict = on_log

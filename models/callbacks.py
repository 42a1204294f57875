"""What watches a run: metrics.jsonl, step lines, loss.png, the progress bar. None of it changes the model."""

import gc
import math
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from runtime.device import GIB, collect_memory, memory_in_use, peak_memory
from runtime.run_files import append_metrics, cut_metrics, read_metrics
from utils.logging_utils import logger
from utils.plot_utils import plot_training

NORM_LIMIT = 1.0  # the documented limit of the gradient norm before clipping
SPIKE_HISTORY = 50  # steps whose median a loss is compared with
SPIKE_FACTOR, SPIKE_MARGIN = 2.0, 0.5  # a spike is above twice the median and half a nat more than it


class RunLog(TrainerCallback):
    """An object per step in metrics.jsonl, a line per `logging_steps`, loss.png at evaluations and at the end."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.folder = Path(trainer.args.output_dir)
        self.window: list[dict] = []  # steps since the last line
        self.losses: deque[float] = deque(maxlen=SPIKE_HISTORY)
        self.warned_norm = NORM_LIMIT

    def on_train_begin(self, args, state, control, **kwargs):
        """On resume, drop what was written after the checkpoint, so that each step stands once."""
        if state.is_world_process_zero:
            cut_metrics(self.folder, self.folder, state.global_step)
        self.step_began = self.line_began = time.perf_counter()
        self.began_at_step = state.global_step
        self.train_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        step = self.trainer.last_step | {
            "seconds": round(now - self.step_began, 4),
            "memory_gib": round(memory_in_use(args.device) / GIB, 4),
            "peak_gib": round(peak_memory(args.device) / GIB, 4),
        }
        self.step_began = now
        if state.is_world_process_zero:
            append_metrics(self.folder, step)
            self._warn(step)
            self.window.append(step)
            if state.global_step % args.logging_steps == 0 or state.global_step in (1, state.max_steps):
                logger.info("%s", self._line(state))
                self.window.clear()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if state.is_world_process_zero:
            append_metrics(self.folder, {"step": state.global_step} | metrics)
            logger.info(
                "step %d | val loss %.4f | val top-1 %.3f, top-5 %.3f",
                state.global_step,
                metrics["eval_loss"],
                metrics["eval_top1"],
                metrics["eval_top5"],
            )
            plot_training(read_metrics(self.folder), self.folder / "loss.png")
        self.step_began = time.perf_counter()  # an evaluation is not the next step's time

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        lines = read_metrics(self.folder)
        skipped = Counter(line["skipped"] for line in lines if "skipped" in line)
        if skipped:
            kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
            logger.warning("%d of %d steps were skipped (%s)", skipped.total(), state.global_step, kinds)
        if self.trainer.eval_dataset is None:  # else the last evaluation draws it
            plot_training(lines, self.folder / "loss.png")

    def _line(self, state) -> str:
        seconds = sum(step["seconds"] for step in self.window)
        images = sum(step["images"] for step in self.window)
        last = self.window[-1]
        norm = last.get("skipped", "") if last["grad_norm"] is None else f"{last['grad_norm']:.3f}"
        losses = [step["loss"] for step in self.window if step["loss"] is not None]
        done = state.global_step - self.began_at_step
        left = (time.perf_counter() - self.train_began) / done * (state.max_steps - state.global_step)
        return (
            f"step {state.global_step}/{state.max_steps} | loss "
            f"{f'{statistics.fmean(losses):.4f}' if losses else 'skipped'} | "
            f"lr {last['learning_rate']:.2e} | grad norm {norm} | {images / seconds:.2f} photos/s | "
            f"{sum(step['image_tokens'] for step in self.window) / images:,.0f} image tokens a image | "
            f"peak {last['peak_gib']:.2f} GiB | {left / 60:.1f} min left"
        )

    def _warn(self, step: dict) -> None:
        """Once for a gradient norm above the limit and again whenever it has doubled; at each spike of the loss."""
        if step["grad_norm"] is not None and step["grad_norm"] > self.warned_norm:
            logger.warning(
                "step %d: gradient norm %.2f before clipping is above %.1f; clipped to %g",
                step["step"],
                step["grad_norm"],
                NORM_LIMIT,
                self.trainer.args.max_grad_norm,
            )
            self.warned_norm = 2 * step["grad_norm"]
        if step["loss"] is None:
            return
        if len(self.losses) >= 10:
            usual = statistics.median(self.losses)
            if step["loss"] > max(SPIKE_FACTOR * usual, usual + SPIKE_MARGIN):
                logger.warning(
                    "step %d: loss %.3f is a spike, the last %d steps had a median of %.3f",
                    step["step"],
                    step["loss"],
                    len(self.losses),
                    usual,
                )
        self.losses.append(step["loss"])


class EarlyStopping(TrainerCallback):
    """Stops after `patience` evaluations in a row none of which gained `min_gain` in top-1 on the best before them.

    All it needs stands in the log history, which a checkpoint keeps, so it goes on after a resume as if never stopped.
    """

    def __init__(self, patience: int, min_gain: float | None, images: int):
        self.patience = patience
        self.min_gain = min_gain
        self.images = images

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps and self.is_over(state.log_history):
            logger.info(
                "step %d | stopping early: no gain in top-1 that counts in the last %d evaluations",
                state.global_step,
                self.patience,
            )
            control.should_training_stop = control.should_save = True

    def is_over(self, history: Sequence[dict]) -> bool:
        """Judged from the log history alone; a run that was killed after its stop is over too."""
        best, waited = None, 0
        for entry in history:
            if "eval_top1" in entry:
                gain = None if best is None else entry["eval_top1"] - best
                if gain is None or (gain > 0 and gain >= self._gain_over(best)):
                    best, waited = entry["eval_top1"], 0
                else:
                    waited += 1
        return waited >= self.patience

    def _gain_over(self, best: float) -> float:
        return resolvable_gain(best, self.images) if self.min_gain is None else self.min_gain


class MemoryCollector(TrainerCallback):
    """Collects memory at the ends of epochs and evaluations; inside a step it would cost more than it frees."""

    def on_train_begin(self, args, state, control, **kwargs):
        gc.freeze()  # what imports made is not looked at again: a collection would take 0.3 s

    def on_train_end(self, args, state, control, **kwargs):
        gc.unfreeze()

    def on_epoch_end(self, args, state, control, **kwargs):
        collect_memory(args.device)

    on_evaluate = on_epoch_end


class ProgressBar(ProgressCallback):
    """The library's bar without its printed dictionaries; silent where the screen is not a terminal."""

    def on_train_begin(self, args, state, control, **kwargs):
        if sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass

    on_prediction_step = on_evaluate = on_predict = on_log


def resolvable_gain(top1: float, images: int) -> float:
    """The least gain in top-1 that this many images can tell from chance: its standard error, at least one image."""
    return max(math.sqrt(top1 * (1 - top1) / images), 1 / images)

"""best/: the weights of the best evaluation, kept while a run trains, found or made again at its end."""

import json
import math
from pathlib import Path

from transformers import TrainerCallback

from models.builder import load_weights
from runtime.atomic import replace_dir
from runtime.checkpoint import METRICS_OF_BEST, MODEL_CARD, read_best, verify_checkpoint, write_manifest
from runtime.run_files import checkpoints_in, step_of
from utils.logging_utils import logger


class BestCheckpoint(TrainerCallback):
    """Keeps the weights of the best evaluation in best/."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.step: int | None = None  # whose weights this process saved last

    def on_evaluate(self, args, state, control, metrics, model, processing_class, **kwargs):
        if state.is_world_process_zero and _rank(metrics) > _rank(read_best(self.folder) or {}):
            self.save(model, processing_class, {"step": state.global_step} | metrics)
            self.step = state.global_step

    def save(self, model, processor, facts: dict) -> None:
        """Trainable weights, processor, `facts` (step and metrics) and a manifest; nothing pickled."""
        with replace_dir(self.folder) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            (folder / MODEL_CARD).unlink(missing_ok=True)  # PEFT's template, with nothing filled in
            (folder / METRICS_OF_BEST).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            write_manifest(folder)

    def find(self, trainer) -> int:
        """The step of best/; without validation the last, and where it is lost or corrupted it is made again."""
        if trainer.eval_dataset is not None:
            best = read_best(self.folder)
            return self.make_again(trainer) if best is None else best["step"]
        self.step = trainer.state.global_step
        self.save(trainer.model, trainer.processing_class, {"step": self.step})
        return self.step

    def make_again(self, trainer) -> int:
        """best/ from the best of what is left of its evaluated weights: in memory, and in the checkpoints."""
        last, metrics = trainer.state.global_step, {}
        for entry in trainer.state.log_history:
            if entry.get("eval_top1") is not None and entry.get("eval_loss") is not None:
                metrics[entry["step"]] = {name: entry[name] for name in ("eval_top1", "eval_loss")}
        order = sorted(metrics, key=lambda step: _rank(metrics[step]), reverse=True)
        places = {step_of(path): path for path in checkpoints_in(self.folder.parent)}

        def is_left(step: int) -> bool:
            return step == last or (step in places and verify_checkpoint(places[step]) is None)

        step = next(filter(is_left, order), last)
        if step != last:
            load_weights(trainer.model, places[step])
        if order and step != order[0]:
            logger.warning(f"the weights of step {order[0]}, the best on val, are lost; those of step {step} are used")
        self.save(trainer.model, trainer.processing_class, {"step": step} | metrics.get(step, {}))
        return step


def _rank(evaluation: dict) -> tuple[float, float]:
    """Sort key of an evaluation: by top-1, then by the lower loss; what is missing or null comes lowest."""
    top1, loss = evaluation.get("eval_top1"), evaluation.get("eval_loss")
    return -1.0 if top1 is None else top1, -math.inf if loss is None else -loss

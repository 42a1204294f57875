"""What an optimizer step must be before it updates the weights: read from the device once, compared and counted."""

import math

import torch

from data.collator import Batch
from data.dataset import UnreadableImages
from models.throughput import FlopCounter
from utils.logging_utils import UserError, logger


class StepChecks:
    """Of the steps of `trainer`, a PlantTrainer; up to `max_skipped` in a row may have no finite loss or gradient."""

    def __init__(self, trainer, max_skipped: int, unreadable: UnreadableImages):
        self.trainer = trainer
        self.max_skipped = max_skipped
        self.unreadable = unreadable
        self.count_flops = FlopCounter(trainer.model)
        self.skipped: list[str] = []  # what was non-finite in the last steps in a row
        self.metrics: dict = {}  # of the last complete step, for RunLog

    def read(self, batch: Batch, loss: torch.Tensor, grad_norm: torch.Tensor) -> dict[str, float]:
        """Mean loss, norm of the gradient, and sums over all ranks.

        `miscounted`: samples whose number of image tokens is not the collator's; `stops`: ranks with a signal.
        """
        trainer, device = self.trainer, self.trainer.args.device
        miscounted = torch.zeros_like(loss)
        if batch.samples:
            is_image_token = batch["input_ids"] == trainer.processing_class.image_token_id
            miscounted = (is_image_token.sum(dim=1) != batch["image_tokens"]).sum()
        counts = {
            "images": len(batch.samples),
            "image_tokens": sum(sample.image_tokens for sample in batch.samples),
            "flops": sum(self.count_flops(sample.length, sample.tiles) for sample in batch.samples),
            "unreadable": len(batch.unreadable),
            "stops": trainer.stop.signal is not None,
        }
        values = torch.tensor(list(counts.values()), dtype=torch.float32).to(device)
        values = torch.cat([torch.stack([loss.float(), miscounted.float()]), values])
        if trainer.dist.world_size > 1:
            torch.distributed.all_reduce(values)
            values[0] /= trainer.dist.world_size
        values = torch.cat([values, grad_norm.to(values).reshape(1)]).tolist()
        return dict(zip(("loss", "miscounted", *counts, "grad_norm"), values))

    def check(self, batch: Batch, values: dict[str, float]) -> None:
        """Fill `metrics`; raise the same error on every rank for a step that must not update the weights."""
        trainer, dist = self.trainer, self.trainer.dist
        step, loss, norm = trainer.state.global_step + 1, values["loss"], values["grad_norm"]
        if values["unreadable"]:
            unreadable = dist.gather_object(batch.unreadable)
            self.unreadable.add(unreadable, dist.is_main_process)
            if not values["images"]:
                raise UserError(
                    f"step {step}: none of its images can be read; fix or remove them ({'; '.join(unreadable[:5])})"
                )
        self.metrics = {
            "step": step,
            "loss": loss if math.isfinite(loss) else None,  # JSON has no infinity
            "grad_norm": norm if math.isfinite(norm) else None,
            "learning_rate": trainer._get_learning_rate(),
            "images": int(values["images"]),
            "image_tokens": int(values["image_tokens"]),
            "flops": values["flops"],
        }
        if math.isfinite(loss) and math.isfinite(norm) and not values["miscounted"]:
            self.skipped.clear()
            return
        ids = ", ".join(dist.gather_object([sample.id for sample in batch.samples]))
        if values["miscounted"]:
            raise UserError(
                f"step {step}: the number of image tokens of {values['miscounted']:.0f} samples changed between the "
                f"collator and the step; the weights were not updated, please report this (samples: {ids})"
            )
        self.handle_non_finite_step(loss, norm, ids)

    def handle_non_finite_step(self, loss: float, norm: float, ids: str) -> None:
        """Skip a step without a trace in weights and optimizer, or raise UserError after too many in a row.

        With fp16 an infinite gradient is no fault: the loss scaler skips such a step and halves its scale.
        """
        step, scaler = self.metrics["step"], self.trainer.accelerator.scaler
        if scaler is not None and math.isfinite(loss) and scaler.get_scale() > 1:
            scale = scaler.get_scale()
            logger.warning("step %d: gradient overflow at loss scale %g; the loss scaler skips the step", step, scale)
            self.metrics["skipped"] = "overflow"
            return
        reason = f"step {step}: loss {loss}, gradient norm {norm}"
        self.skipped.append(f"{reason} (samples: {ids})")
        if len(self.skipped) > self.max_skipped:
            steps = "this step" if len(self.skipped) == 1 else f"the last {len(self.skipped)} steps"
            raise UserError(
                f"{reason}; the weights were not updated in {steps}. Check these images, or use a lower "
                f"--learning-rate or --mixed-precision bf16: {'; '.join(self.skipped)}"
            )
        if self.trainer.dist.is_main_process:
            logger.warning("%s; the step is skipped (samples: %s)", reason, ids)
        self.metrics["skipped"] = "not finite"
        self.trainer.model.zero_grad()  # without gradients the optimizer updates nothing

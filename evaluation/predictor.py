"""Names for images: the likeliest classes of each, how likely they are, and whether that is enough to say one."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import softmax

from config.training_config import TrainingConfig
from evaluation.evaluator import read_calibration
from evaluation.report import Calibration
from models.builder import DTYPES
from models.scoring import score_batches
from runtime.device import fit_workers
from utils.logging_utils import logger

FEW = 30  # images of val, with which a threshold says little


class Prediction(NamedTuple):
    """What an image shows: all class names with their probabilities, likeliest first."""

    likeliest: list[tuple[str, float]]
    is_confident: bool  # the likeliest reaches the threshold that was fitted on val


def percent(share: float) -> str:
    """Never 0 % or 100 %, which no image is."""
    return "<1%" if share < 0.005 else ">99%" if share > 0.995 else f"{share:.0%}"


def build_predictor(
    config: TrainingConfig, model, collator, precision: str, folder: Path, adapter: str | None
) -> "Predictor":
    """A Predictor with the temperature and threshold fitted for these weights; warns where there are none."""
    calibration = read_calibration(folder, adapter)
    if calibration is None and config.train_on_val:
        logger.warning(
            '%s: learned from val, so nothing was fitted: confidence is the model\'s own, nothing "not sure"', folder
        )
    elif calibration is None:
        logger.warning(
            '%s: has no calibration for its weights; confidence is the model\'s own and nothing is "not sure". '
            "Fit it on val with: python evaluate.py %s",
            *(folder, folder),
        )
    elif calibration.images < FEW:
        logger.warning(
            '%s: "not sure" was fitted on %d images of val alone; do not rely on it', *(folder, calibration.images)
        )
    elif calibration.threshold is None:
        logger.warning(
            '%s: no confidence reached a precision of %g on val, so that every image is "not sure"',
            *(folder, calibration.target_selective_accuracy),
        )
    workers = fit_workers(config.num_workers, collator.batch_bytes(config.per_device_eval_batch_size))
    return Predictor(model, collator, calibration, config.per_device_eval_batch_size, workers, DTYPES[precision])


class Predictor:
    """`collator` is a data.collator.PlantCollator; `calibration` None: the model's own confidence, always sure."""

    def __init__(
        self, model, collator, calibration: Calibration | None, batch_size: int, num_workers: int, dtype: torch.dtype
    ):
        self.model = model
        self.collator = collator
        self.calibration = calibration
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.dtype = dtype

    def name(self, images: Sequence[str | Path]) -> Iterator[Prediction | str]:
        """For each file in turn what it shows, or the reason why it cannot be opened, as they become known."""
        rows = [
            {"image": {"bytes": None, "path": str(image)}, "label": 0, "id": str(index)}
            for index, image in enumerate(images)
        ]
        workers = min(self.num_workers, len(rows) // self.batch_size)  # they take longer to start than a few images
        options = self.batch_size, workers, self.dtype
        for scores, unreadable in score_batches(self.model, self.collator, rows, *options):
            found = {int(one.id): self._judge(np.array(one.values)) for one in scores}
            found |= {int(image): reason for image, _, reason in (one.partition(": ") for one in unreadable)}
            yield from (found[index] for index in sorted(found))

    def _judge(self, scores: np.ndarray) -> Prediction:
        shares = softmax(scores / (self.calibration.temperature if self.calibration else 1.0))
        order = np.argsort(-shares, kind="stable")
        likeliest = [(self.collator.class_names[label], float(shares[label])) for label in order]
        threshold = 0.0 if self.calibration is None else self.calibration.threshold
        return Prediction(likeliest, threshold is not None and likeliest[0][1] >= threshold)

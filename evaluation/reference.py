"""Features of some train images, with which those of other images are compared; kept in the run directory."""

import functools
import hashlib
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data.dataset import PlantData
from data.streaming import Stream
from evaluation.calibration import Calibration
from evaluation.open_set import SCORES, SPACES, SUMS, Detector, Reference
from models.features import feature_widths
from runtime.atomic import write_file
from runtime.run_files import BOOL, COUNT, TEXT, number, validate
from utils.logging_utils import UserError

if TYPE_CHECKING:
    from evaluation.evaluator import Evaluator

REFERENCE_FILE = "reference.safetensors"
# Train images whose features are computed, in all and of each class: by the tower, which is fast, and by all the model.
MANY, FEW = {"tower": 1000, "state": 500}, {"tower": 10, "state": 1}
MOST = {"tower": 1000, "state": 20}
LIMIT = 20_000  # in all, where that leaves one of each class
FACTS = {"identity": TEXT, "images": COUNT, "seconds": number(0), "tower_is_trained": BOOL, "unreadable?": [TEXT]}


class TrainImages(NamedTuple):
    rows: Dataset
    features: np.ndarray  # (m, D) of the tower, of the rows


def find_train_images(reference: Reference | str, data: PlantData | None) -> TrainImages | None:
    """The images of a reference, or None without one."""
    if isinstance(reference, str) or data is None or isinstance(data.train, Stream):
        return None
    rows = sample_by_class(data.train, len(data.class_names), "tower")
    places = {image: place for place, image in enumerate(rows["id"])}
    rows = rows.select([places[image] for image in sorted(places.keys() - {*reference.facts["unreadable"]})])
    return TrainImages(rows, reference.features["tower"])


def find_reference(evaluator: "Evaluator", data: PlantData | None) -> Reference | str:
    """That of the run directory, if it is of these weights and images, or a new one; or why there is none.

    All ranks call it; rank 0 alone gets a reference.
    """
    if data is None:
        return "no train images were given"
    if isinstance(data.train, Stream):
        return "the train images are streamed, so none are at hand"
    samples = {"tower": sample_by_class(data.train, len(data.class_names), "tower")}
    samples["state"] = sample_by_class(samples["tower"], len(data.class_names), "state")  # computed for both at once
    listed = [evaluator.facts, *(list(rows["id"]) for rows in samples.values())]
    identity = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    path, known = evaluator.folder / REFERENCE_FILE, None
    if evaluator.dist.is_main_process and (saved := read_reference(path)) is not None:
        is_same = saved.facts["identity"] == identity and "unreadable" in saved.facts  # an older program did not say
        known = saved if is_same else None
    if any(evaluator.dist.gather_object([known is not None])):
        return known or "rank 0 has it"
    towers, states = {}, {}
    began = time.perf_counter()
    examine = functools.partial(evaluator.plant.score, with_features=True, with_names=False)
    for sample, found in evaluator.distribute(examine, samples["state"]):
        towers[sample.id], states[sample.id] = (sample.label, found.tower), (sample.label, found.state)
    seconds, done = time.perf_counter() - began, set(samples["state"]["id"])
    rest = samples["tower"].select([at for at, image in enumerate(samples["tower"]["id"]) if image not in done])
    if len(rest):
        began = time.perf_counter()
        for sample, tower in evaluator.distribute(evaluator.plant.embed, rest):
            towers[sample.id] = sample.label, tower
        seconds = (time.perf_counter() - began) * len(towers) / len(rest)  # as if the tower alone had seen all
    entries = {"tower": towers, "state": states}
    if not all(entries.values()):
        return "no train image can be opened"
    ordered = {space: [found[image] for image in sorted(found)] for space, found in entries.items()}
    features = {space: np.stack([each for _, each in found]).astype(np.float16) for space, found in ordered.items()}
    labels = {space: np.array([label for label, _ in found]) for space, found in ordered.items()}
    facts = {"identity": identity, "images": len(data.train), "seconds": round(seconds, 2)}
    facts["unreadable"] = sorted({*samples["tower"]["id"]} - towers.keys())
    tower = evaluator.plant.base.model.vision_tower
    facts["tower_is_trained"] = any(parameter.requires_grad for parameter in tower.parameters())
    reference = Reference(features, labels, facts)
    # A quick look must not take away what calibration.json refers to.
    if evaluator.dist.is_main_process and (evaluator.is_kept or (evaluator.is_own and not path.exists())):
        write_reference(path, reference)
    return reference


def sample_by_class(rows: Dataset, classes: int, space: str) -> Dataset:
    """So many images of each class, evenly spaced, that all are about MANY, in the order of the rows."""
    count = min(max(MANY[space] // classes, FEW[space]), MOST[space], max(LIMIT // classes, 1))
    by_class = defaultdict(list)
    for index, label in enumerate(rows["label"][:]):
        by_class[label].append(index)
    return rows.select(sorted(index for found in by_class.values() for index in found[:: -(-len(found) // count)]))


def write_reference(path: Path, reference: Reference) -> None:
    tensors = {f"{space}.features": reference.features[space] for space in SPACES}
    tensors |= {f"{space}.labels": reference.labels[space] for space in SPACES}
    write_file(path, save(tensors, metadata={"facts": json.dumps(reference.facts)}))


def read_reference(path: Path) -> Reference | None:
    """None where there is none, or none that can be used."""
    try:
        with safe_open(path, "numpy") as file:
            facts = validate(json.loads((file.metadata() or {})["facts"]), FACTS)
            parts = [{space: file.get_tensor(f"{space}.{part}") for space in SPACES} for part in ("features", "labels")]
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    features, labels = parts
    is_whole = all(
        features[space].ndim == 2
        and labels[space].shape == features[space].shape[:1] != (0,)
        and labels[space].dtype.kind == "i"
        and np.isfinite(features[space]).all()
        for space in SPACES
    )
    return Reference(features, labels, facts) if is_whole else None


def load_detector(folder: Path, calibration: Calibration | None, config: Any) -> Detector | str | None:
    """That of a run, whose model has this config, or why it has none; None of a run made before there were any.

    Raises UserError for a score that does not exist.
    """
    fitted = calibration and calibration.open_set
    if not calibration or not fitted:
        return None
    if fitted["score"] is None or fitted["threshold"] is None:
        return f'no "none of these": {fitted["missing"]}'
    again = f"make it again: python evaluate.py {folder}"
    parts = tuple(fitted["score"].split(" + "))
    if not (parts in SUMS or len(parts) == 1) or not fitted["scale"].keys() >= set(parts) <= SCORES:
        raise UserError(f"{folder}: calibration.json: {fitted['score']!r} is no open-set score; {again}")
    reference, widths = read_reference(folder / REFERENCE_FILE), feature_widths(config)
    if (
        reference is None
        or reference.facts["identity"] != fitted.get("reference")
        or {name: features.shape[1] for name, features in reference.features.items()} != widths
    ):
        return f'no "none of these": {REFERENCE_FILE} is missing, corrupted or another one; {again}'
    return build_detector(reference, calibration)


def build_detector(reference: Reference | str, calibration: Calibration | None) -> Detector | str:
    """What was fitted with these features; or why there is none."""
    if isinstance(reference, str):
        return reference
    if calibration is None or calibration.open_set is None:
        return "the run was trained on val"
    return Detector(calibration, reference.spaces)

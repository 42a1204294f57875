"""The data of a run: rows of a source (data/sources.py), split, sampled, checked.

A row is {"image": {"bytes", "path"}, "label": int, "id": str}; images are decoded one at a time, in the collator.
"""

import dataclasses
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from config.training_config import TrainingConfig
from data.rows import ROW, SPLITS, Reading, by_key, count_images
from data.sources import load_source
from data.splits import hold_out_classes, split_source
from data.streaming import Stream
from data.synthetic import SPLIT_SIZES  # noqa: F401  of the synthetic images; tests change it in place
from data.taxonomy import Taxonomy, find_taxonomy
from utils.image_utils import ImageError
from utils.logging_utils import UserError, logger

SAMPLED = 2000  # images that stand for all of a split where reading each would take long
FEW_UNREADABLE = 2  # images of a split: of sixty images one is more than 1 %
STREAM_SAMPLED = 500  # of a stream, whose first rows are held in memory


@dataclasses.dataclass(frozen=True)
class PlantData:
    """The splits of a source, and what its labels are called."""

    train: Dataset | Stream
    validation: Dataset | None  # None if it is trained on: then it measures nothing
    test: Dataset
    class_names: list[str]
    source: str  # for the log
    notes: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    revision: str | None = None  # commit of a hub data set
    unknown: Dataset | None = None  # all images of the classes that are not learned
    taxonomy: Taxonomy | None = None  # genus and family of each class, where any is known

    @property
    def num_train(self) -> int:
        return count_images(self.train)

    def fingerprint(self) -> str:
        """Hash of which images are in train and val: one that changes sides would be trained on and scored."""
        digest = hashlib.sha256()
        for rows in (self.train, self.validation):
            if isinstance(rows, Stream):
                pairs = [(file.name, file.stat().st_size) for file in rows.files]
            else:
                pairs = list(zip(rows["id"][:], rows["label"][:])) if rows else []
            digest.update(json.dumps(sorted(pairs)).encode())
        return digest.hexdigest()

    def validate(self) -> None:
        """Raise UserError for an empty split, fewer than two classes, or a repeated image."""
        splits = {split: getattr(self, split) for split in SPLITS}
        held = {split: rows for split, rows in splits.items() if not isinstance(rows, Stream)}
        for split, rows in splits.items():
            if not count_images(rows):
                raise UserError(f"{self.source}: split {split} has no images; add some, or use another --dataset")
        # The labels of a stream are not known before it is read.
        if len(self.class_names) < 2 or ("train" in held and len(set(self.train["label"][:])) < 2):
            problem = f"only one class ({self.class_names[0]!r}); there is nothing to classify, add a second"
            raise UserError("; ".join([f"{self.source}: {problem}", *self.warnings]))
        for image_id, count in Counter(itertools.chain(*(rows["id"][:] for rows in held.values()))).items():
            if count > 1:
                problem = "is in two splits, or twice in one; remove all but one"
                raise UserError(f"{self.source}: image {image_id} {problem}")

    def assert_matches(self, class_names: Sequence[str], fingerprint: str | None, run: str | Path) -> None:
        """Raise UserError unless the classes, and by its `fingerprint` the split, are those that `run` learned."""
        if self.class_names != list(class_names):
            unknown = [name for name in self.class_names if name not in class_names]
            problem = f"its {len(self.class_names)} classes are not the {len(class_names)} that {run} learned"
            examples = ", ".join(unknown[:3]) or "some are missing"
            raise UserError(f"{self.source}: {problem} ({examples}); give images of the same classes with --dataset")
        if fingerprint is not None and fingerprint != self.fingerprint():
            problem = f"its images changed since {run} was trained, so the split differs"
            move = "put them back, or give new images with --dataset"
            raise UserError(f"{self.source}: {problem} and images that it learned would be scored; {move}")


def build_datasets(config: TrainingConfig) -> PlantData:
    """The splits that a config asks for. Raises UserError in one sentence for a source that cannot be used."""
    reading = Reading(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Reading)})
    source, unknown = hold_out_classes(load_source(config.dataset, reading), config.holdout_classes, config.seed)
    fractions = {"validation": config.val_fraction, "test": config.test_fraction}
    source = split_source(source, fractions, config.seed, config.group_by, config.min_images)
    names = source.class_names
    taxonomy, found, lacking = find_taxonomy(names, config.dataset, config.taxonomy)
    data = PlantData(
        **source.splits,
        class_names=names,
        source=source.description,
        notes=[*source.notes, *found],
        warnings=[*source.warnings, *lacking],
        revision=source.revision,
        unknown=unknown,
        taxonomy=taxonomy,
    )
    listed = ", ".join(names if len(names) <= 12 else [*names[:10], "...", names[-1]])
    for note in (*data.notes, f"classes: {listed}"):
        logger.info("data | %s", note)
    for warning in data.warnings:
        logger.warning("%s", warning)
    data.validate()
    train, validation = data.train, data.validation
    if config.sample_fraction < 1:
        train, validation = (sample(rows, config.sample_fraction, config.seed) for rows in (train, validation))
    if config.train_on_val:
        train, validation = concatenate_datasets([train, validation]), None
    return dataclasses.replace(data, train=train, validation=validation)


def sample_rows(rows: Dataset | Stream, count: int = SAMPLED) -> Dataset:
    """At most `count` rows, evenly spaced; of a stream its first, of which each rank has its own."""
    if isinstance(rows, Stream):
        return Dataset.from_list(rows.head(min(count, STREAM_SAMPLED)), features=ROW)
    return rows.select(range(0, len(rows), max(-(-len(rows) // count), 1)))


def sample(rows: Dataset, fraction: float, seed: int) -> Dataset:
    """A seeded fraction of each class, at least one image of each, in the order of the rows."""
    by_class = by_key((label, index) for index, label in enumerate(rows["label"][:]))
    draw = random.Random(seed)
    kept = [draw.sample(indices, max(round(fraction * len(indices)), 1)) for _, indices in sorted(by_class.items())]
    return rows.select(sorted(itertools.chain(*kept)))


def take(rows: Dataset, count: int | None) -> Dataset:
    """All rows, or that many of them, drawn with a fixed seed, in the order of the rows."""
    if count is None or count >= len(rows):
        return rows
    return rows.select(sorted(random.Random(0).sample(range(len(rows)), count)))


def check_unreadable_fraction(unreadable: Collection[str], images: int, max_bad_fraction: float) -> None:
    """Raise ImageError if more than this fraction of so many images is in `unreadable`, "id: reason" for each.

    One or two stop nothing, unless they are all there are or the fraction is 0.
    """
    limit = max_bad_fraction * images
    if 0 < max_bad_fraction < 1:
        limit = min(max(limit, FEW_UNREADABLE), images - 1)
    if len(unreadable) > limit:
        problem = f"{len(unreadable)} of {images} images cannot be opened, above max_bad_fraction={max_bad_fraction}"
        examples = "; ".join(sorted(unreadable)[:5])
        raise ImageError(f"{problem} ({examples}); repair or remove them, or raise --max-bad-fraction")


class UnreadableImages:
    """The unreadable images of a split of `num_images`, found batch by batch; each is logged once."""

    def __init__(self, split: str, num_images: int, max_fraction: float):
        self.split = split
        self.num_images = num_images
        self.max_fraction = max_fraction
        self.known: set[str] = set()

    def add(self, unreadable: Collection[str], is_logged: bool = True) -> None:
        """`unreadable` is "id: reason" of each image. Raises ImageError above `max_fraction` of the split."""
        new = sorted(set(unreadable) - self.known)
        self.known.update(new)
        for entry in new if is_logged else ():
            logger.warning("image skipped (%d of %s so far): %s", len(self.known), self.split, entry)
        check_unreadable_fraction(self.known, self.num_images, self.max_fraction)

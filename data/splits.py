"""Honest splits of a source: copies and images of one plant on one side, what is missing cut from train, few images.

The place of an image in a cut is a hash of the seed and its id, so that images that are added later move no other.
"""

import difflib
import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset, concatenate_datasets
from datasets.table import InMemoryTable, concat_tables
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data.copies import find_copies
from data.groups import find_plants
from data.rows import SPLITS, Source, by_key
from data.streaming import Stream
from utils.logging_utils import UserError, some

NOWHERE = -1  # the side of an image that is not used; else it is a place in SPLITS
LISTED = 10  # class names in a sentence


def split_source(
    source: Source, fractions: dict[str, float], seed: int, group_by: str | None = None, min_images: int = 1
) -> Source:
    """The source with all three splits; `fractions` are those of validation and test, for a source without them.

    `group_by` is a regular expression of what the ids of images of one plant have in common, `min_images` the least
    number of images of a class, over all splits. What was done is added to notes and warnings. Raises UserError.
    """
    missing = [split for split in SPLITS if split not in source.splits]
    splits = {split: rows for split, rows in source.splits.items() if not isinstance(rows, Stream)}
    is_ready = source.is_published and not missing and group_by is None and min_images == 1
    if is_ready or len(splits) < len(source.splits):  # a stream has all splits
        return source
    if "train" in missing:
        given = f"has {' and '.join(source.splits)}, and no train split to learn from"
        raise UserError(f"{source.description}: {given}; add one, or give images without splits")
    images = _Images(source, splits, missing)
    images.skip_copies()
    images.skip_rare_classes(min_images)
    images.find_groups(group_by)
    if missing:
        images.split_off({split: fractions[split] for split in missing}, seed)
    images.skip_untrained_classes()
    return images.build()


class _Images:
    """The images of all splits of a source in one row, and what is found out about them."""

    def __init__(self, source: Source, splits: dict[str, Dataset], missing: list[str]):
        self.source, self.missing = source, missing
        self.where, self.names = source.description, source.class_names
        self.rows = concatenate_datasets([*splits.values()])
        self.ids: list[str] = self.rows["id"][:]
        self.labels = np.array(self.rows["label"][:], dtype=np.int64)
        self.sides = np.repeat([SPLITS.index(split) for split in splits], [len(rows) for rows in splits.values()])
        self.plants = np.arange(len(self.ids))  # equal numbers: images of one plant, or copies
        self.copies: list[list[int]] = []
        self.rare: set[int] = set()  # labels of classes below min_images
        self.notes, self.warnings = list(source.notes), list(source.warnings)

    def skip_copies(self) -> None:
        """Skip copies in two classes and copies of images of a later split; remember all that stay."""
        in_two_classes, leaked = [], []
        for copies in find_copies(self.rows):
            highest = self.sides[copies].max()
            lower = [number for number in copies if self.sides[number] < highest]
            if len(set(self.labels[copies])) > 1:
                in_two_classes.append(copies)
            elif lower:
                leaked.append((lower, next(number for number in copies if self.sides[number] == highest)))
            else:
                self.copies.append(copies)
        if in_two_classes:
            self._skip_contradictions(in_two_classes)
        if leaked:
            self._skip_leaked(leaked)
        if self.copies and self.missing:
            ids = ([self.ids[number] for number in copies] for copies in self.copies)
            by_length = (sorted(names, key=lambda name: (len(name), name)) for names in ids)
            pairs = some(f"{copied} of {original}" for original, copied, *_ in by_length)
            number = _count(sum(map(len, self.copies)) - len(self.copies), "copy", "copies")
            self.notes.append(f"{number} of images ({pairs}): all copies of an image stay in one split")

    def _skip_contradictions(self, found: list[list[int]]) -> None:
        numbers = [number for copies in found for number in copies]
        self.sides[numbers] = NOWHERE
        kept = self.labels[self.sides != NOWHERE]
        lost = [label for label, count in Counter(self.labels[numbers]).items() if count > 2 and label not in kept]
        if lost:
            pair = " and ".join(self.ids[number] for number in found[0][:2])
            problem = f"all images of {some(self.names[label] for label in lost)} are in two classes, such as {pair}"
            raise UserError(f"{self.where}: {problem}; merge folders of one class, or move the copies elsewhere")
        examples = some(" and ".join(self.ids[number] for number in copies[:3]) for copies in found)
        self.warnings.append(f"{examples} are the same file in two classes; all {len(numbers):,} images are not used")

    def _skip_leaked(self, found: list[tuple[list[int], int]]) -> None:
        numbers = [number for lower, _ in found for number in lower]
        was_trained = (self.sides == 0).any()
        self.sides[numbers] = NOWHERE
        if was_trained and not (self.sides == 0).any():
            problem = f"all {len(numbers):,} images of train are copies of images of validation or test"
            move = "move these elsewhere, and they are cut from train"
            raise UserError(f"{self.where}: {problem}, so nothing is left to learn from; {move}")
        examples = [f"{self.ids[lower[0]]} of {self.ids[scored]}" for lower, scored in found]
        copies = _count(len(numbers), "copy", "copies")
        self.warnings.append(
            f"{copies} of images of a split that is scored ({some(examples)}): not used for training or selection"
        )

    def skip_rare_classes(self, min_images: int) -> None:
        counts = np.bincount(self.labels[self.sides != NOWHERE], minlength=len(self.names))
        rare = np.flatnonzero((counts < min_images) & (counts > 0)).tolist()
        if not rare or np.count_nonzero(counts) < 2:  # PlantData.validate refuses a single class
            return
        if np.count_nonzero(counts) - len(rare) < 2:
            problem = f"{len(rare)} of {np.count_nonzero(counts)} classes have fewer images"
            move = f"use --min-images {np.sort(counts)[-2]} or less, or add images"
            raise UserError(f"--min-images {min_images}: {problem}, and two classes or more are needed; {move}")
        self.rare = set(rare)
        listed = [f"{self.names[label]} ({counts[label]})" for label in rare]
        self._skip_classes(rare, f"fewer than {min_images} images", f"not used (--min-images {min_images})", listed)

    def _skip_classes(self, labels: Sequence[int], have: str, are: str, listed: list[str]) -> None:
        self.sides[np.isin(self.labels, labels)] = NOWHERE
        classes = f"1 class has {have} and is" if len(labels) == 1 else f"{len(labels):,} classes have {have} and are"
        self.warnings.append(f"{classes} {are}: {some(listed, LISTED)}")

    def find_groups(self, pattern: str | None) -> None:
        """Give images of one plant one number; copies are of one plant."""
        groups, rule = find_plants(self.rows, pattern)
        if pattern is not None and not any(groups):
            problem = (
                f"matches none of {len(groups):,} images, such as {self.ids[0]}; the first group of the expression"
            )
            move = "or all that it matches, must be what images of one plant have in common"
            raise UserError(f"--group-by {pattern}: {problem}, {move}")
        used = [number for number in np.flatnonzero(self.sides != NOWHERE).tolist() if groups[number]]
        members = by_key(((self.labels[number], groups[number]), number) for number in used)
        several = [numbers for numbers in members.values() if len(numbers) > 1]
        content = np.arange(len(self.ids))
        for copies in self.copies:
            content[copies] = copies[0]
        differing = [numbers for numbers in several if len(set(content[numbers])) > 1]
        self._report_groups(differing, rule)
        pairs = [(group[0], other) for group in several + self.copies for other in group[1:]]
        if pairs:
            first, second = np.array(pairs).T
            shape = (len(self.ids), len(self.ids))
            self.plants = connected_components(coo_array((np.ones(len(first)), (first, second)), shape))[1]

    def _report_groups(self, groups: list[list[int]], rule: str) -> None:
        if groups and self.missing:
            images, example = sum(map(len, groups)), some([self.ids[number] for number in groups[0]], 2)
            another = "" if rule == "--group-by" else "; --group-by sets another rule"
            found = f"{images:,} images in {_count(len(groups), 'group', 'groups')} by {rule} ({example})"
            self.notes.append(f"{found}: a group stays in one split{another}")
        divided = [numbers for numbers in groups if len(set(self.sides[numbers])) > 1]
        if divided:
            first, *others = divided[0]
            other = next(number for number in others if self.sides[number] != self.sides[first])
            found = f"{_count(len(divided), 'group', 'groups')} of images of one plant by {rule}"
            problem = "in two splits as they are given, so scores come out too high"
            pair = f"{self.ids[first]}, {self.ids[other]}"
            self.warnings.append(f"{found} ({pair}): {problem}; put a plant's images into one split")

    def split_off(self, fractions: dict[str, float], seed: int) -> None:
        """Move images from train into the splits of `fractions`, each its share of each class and at least a group."""
        needed = len(fractions) + 1
        few: dict[str, list[str]] = {"images": [], "groups of images": []}
        train = np.flatnonzero(self.sides == 0)
        numbers_of = by_key((int(self.labels[number]), number) for number in train.tolist())
        side_of: dict[int, int] = {}  # of groups
        for label, numbers in sorted(numbers_of.items()):
            # A group's place is that of its first image by name: the least place of all would be a low one.
            by_name = sorted(numbers, key=self.ids.__getitem__, reverse=True)
            first = {self.plants[number]: self.ids[number] for number in by_name}
            places = {plant: _place(image_id, seed) for plant, image_id in first.items()}
            if len(places) >= needed:
                side_of |= zip(sorted(places, key=places.__getitem__), _sides(sorted(places.values()), fractions))
            else:
                few["images" if len(numbers) < needed else "groups of images"].append(self.names[label])
        self.sides[train] = [side_of.get(plant, 0) for plant in self.plants[train]]
        if sum(map(len, few.values())) == len(numbers_of):
            what = "groups of images" if few["groups of images"] else "images"
            regroup = "group them otherwise with --group-by, " if few["groups of images"] else ""
            problem = f"no class has {needed} {what}, one each for train and {' and '.join(self.missing)}"
            raise UserError(f"{self.where}: {problem}; add images, {regroup}or give folders train, validation and test")
        shares = [f"{split} ({fraction:.0%} of each class)" for split, fraction in fractions.items()]
        self.notes.append(f"{' and '.join(shares)} not given: cut from train, with --seed {seed}")
        for what, names in few.items():
            if names:
                leave = f"; --min-images {needed} leaves them out" if what == "images" else ""
                found = f"{_count(len(names), 'class has', 'classes have')} fewer than {needed} {what}"
                self.warnings.append(f"{found} ({some(names, LISTED)}): they are learned, not scored{leave}")

    def skip_untrained_classes(self) -> None:
        """Skip the classes that train has no image of: no answer could be right."""
        trained = set(self.labels[self.sides == 0].tolist())
        untrained = sorted(set(range(len(self.names))) - trained - self.rare)
        if not untrained or not trained:
            return
        before = set(self.sides.tolist())
        known = {self.names[label].lower(): self.names[label] for label in trained}
        hints = []
        for label in untrained[: LISTED + 1]:
            close = difflib.get_close_matches(self.names[label].lower(), known, n=1, cutoff=0.8)
            hints.append(self.names[label] + (f" (train has {known[close[0]]})" if close else ""))
        self._skip_classes(untrained, "no images in train", "not used", hints)
        for side in sorted(before - set(self.sides.tolist()) - {NOWHERE}):
            examples = f"{some(hints)}; train has {some(sorted(known.values()))}"
            problem = f"no class of {SPLITS[side]} is one of train ({examples})"
            raise UserError(f"{self.where}: {problem}; call the classes of both the same")

    def build(self) -> Source:
        """The source of the images that are used, each in its split, without a column of groups."""
        kept = sorted(set(self.labels[self.sides != NOWHERE].tolist()))
        rows = self.rows if len(kept) == len(self.names) else _renumber(self.rows, kept)
        rows = rows.select_columns(["image", "label", "id"])
        splits = {split: rows.select(np.flatnonzero(self.sides == side)) for side, split in enumerate(SPLITS)}
        class_names = [self.names[label] for label in kept]
        return self.source._replace(splits=splits, class_names=class_names, notes=self.notes, warnings=self.warnings)


def hold_out_classes(source: Source, count: int, seed: int) -> tuple[Source, Dataset | None]:
    """The source without `count` of its classes, taken by the seed, and all images of these. Raises UserError."""
    names = source.class_names
    if not count:
        return source, None
    check_holdout(count, len(names), source.description)
    taken = sorted(sorted(range(len(names)), key=lambda label: _place(names[label], seed))[:count])
    left = [label for label in range(len(names)) if label not in taken]
    kept, unknown = {}, []
    for split, rows in source.splits.items():
        assert not isinstance(rows, Stream)  # a config that streams cannot hold out classes
        is_kept = np.isin(rows["label"][:], left)
        rows = _renumber(rows, left)
        kept[split] = rows.select(np.flatnonzero(is_kept))
        unknown.append(rows.select(np.flatnonzero(~is_kept)).select_columns(["image", "label", "id"]))
    images = concatenate_datasets(unknown)
    note = f"held out, with --seed {seed}: {len(images):,} images of {some([names[label] for label in taken], LISTED)}"
    names = [names[label] for label in left]
    return source._replace(splits=kept, class_names=names, notes=[*source.notes, note]), images


def _renumber(rows: Dataset, kept: list[int]) -> Dataset:
    """The rows with labels that count the `kept` classes alone; of another class the label is 0."""
    labels = rows.data.column("label").to_numpy()  # of the whole table: add_column would copy a selection's images
    labels = np.where(np.isin(labels, kept), np.searchsorted(kept, labels), 0)
    table = concat_tables([rows.data.drop(["label"]), InMemoryTable.from_pydict({"label": labels})], axis=1)
    return Dataset(table.select(rows.column_names), rows.info, indices_table=rows._indices)


def check_holdout(count: int, classes: int, whose: str) -> None:
    """Raise UserError unless two of the classes are left."""
    if classes - count < 2:
        move = f"use {classes - 2} or less" if classes > 2 else "leave it out"
        reason = f"{whose} has {classes} classes, and two or more have to be learned"
        raise UserError(f"--holdout-classes {count}: {reason}; {move}")


def _place(image_id: str, seed: int) -> float:
    """In [0, 1), the same on every machine and whatever other images there are."""
    digest = hashlib.sha256(f"{seed} {image_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _sides(places: list[float], fractions: dict[str, float]) -> Iterator[int]:
    """The splits of groups at these sorted places: each split in turn gets those below its bound, at least one."""
    taken, bound = 0, 0.0
    for index, (split, fraction) in enumerate(fractions.items()):
        bound += fraction
        needed_later = len(fractions) - index  # one for each later split and for train
        end = min(max(bisect_left(places, bound), taken + 1), len(places) - needed_later)
        yield from [SPLITS.index(split)] * (end - taken)
        taken = end


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number:,} {singular if number == 1 else plural}"

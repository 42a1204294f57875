"""What labels are called: folders and table entries as written become class names, and which are one class."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.class_names import find_class_names, read_class_names
from data.groups import original_of
from data.labels import are_codes, name_key, tidy_name, without_numbers
from utils.logging_utils import UserError, some


@dataclass
class Labeling:
    """Class names, the class of each label as written, and where the names come from."""

    names: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    table: Path | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def name_classes(
    written: Sequence[str], names_file: str | None, beside: Sequence[Path], counts: Mapping[str, int] | None = None
) -> Labeling:
    """Classes in the order of `written`; of several spellings of one, the name is the one of most images (`counts`).

    `names_file`: a file of names for them; `beside`: folders in which such a file is looked for, if the labels are
    numbers or codes. Raises UserError for a file that lacks some, and for empty names.
    """
    labeling = Labeling()
    called = {label: tidy_name(name) for label, name in _call(written, names_file, beside, labeling).items()}
    by_key: dict[str, list[str]] = defaultdict(list)
    for label in written:
        by_key[name_key(called[label]) or called[label]].append(label)
    if empty := by_key.get(""):
        raise UserError(
            f"labels without a name: {', '.join(map(repr, empty[:5]))}; rename them, or use --class-names FILE"
        )
    for number, labels in enumerate(by_key.values()):
        best = max(labels, key=lambda label: counts[label]) if counts else labels[0]
        labeling.names.append(called[best])
        labeling.labels.update(dict.fromkeys(labels, number))
        if len(labels) > 1:
            listed = " and ".join(map(repr, labels[:5]))
            labeling.warnings.append(f"{listed} are read as one class, {called[best]!r}; rename one if they differ")
    for name in labeling.names:
        if (original := original_of(name)) and name_key(original) in by_key:
            labeling.warnings.append(f"{name!r} looks like a copy of {original!r}; if it is one, merge the two")
    return labeling


def _call(
    written: Sequence[str], names_file: str | None, beside: Sequence[Path], labeling: Labeling
) -> Mapping[str, str]:
    """What each label is called by the given file or one beside, else by itself without numbers."""
    called: Mapping[str, str] = dict(zip(written, written))
    if names_file is not None:
        called, labeling.table = read_class_names(Path(names_file), written), Path(names_file)
    elif (plain := without_numbers(written)) is not None:
        labeling.notes.append(f"names without their numbers: {written[0]} is {tidy_name(plain[0])}")
        return dict(zip(written, plain))
    elif are_codes(written):
        called, labeling.table = find_class_names(written, beside) or (called, None)
        if labeling.table is None:
            labeling.warnings.append(
                f"classes are called {some(written)}, and the model would answer with that; a json or csv file of code "
                "and name gives them names: --class-names FILE"
            )
    if labeling.table is not None:
        labeling.notes.append(f"names from {labeling.table}: {written[0]} is {tidy_name(called[written[0]])}")
    return called

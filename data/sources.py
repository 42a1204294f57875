"""Where images come from: the source that a path or name refers to.

A folder is looked at once (data/survey.py); its contents tell whether it is the official release of Oxford Flowers
102, parquet files, a saved data set, a table of labels, or class folders. What is not used is reported.
"""

import copy
import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from datasets import Dataset

from data.folders import load_class_folders, load_tables, with_parent_tables
from data.hub import HUB_REPOSITORY, load_hub, load_hub_dataset
from data.labels import name_key
from data.layout import Layout, describe_flat, find_boxes, give_one, read_layout, unpack_command
from data.oxford_flowers import find_release, load_official_release
from data.parquet import has_images, load_parquet_files, load_saved_dataset, stream_parquet_folder
from data.rows import ROW, Reading, Source, build_rows
from data.survey import ARCHIVES, TABLES, add_unused, survey
from data.synthetic import SPECIES, SPLIT_SIZES, draw_split
from data.tables import find_label_tables
from utils.image_utils import is_image_name, printable
from utils.logging_utils import UserError, logger, some

ADDRESS = re.compile(r"\w+://|www\.|[\w-]+(\.[\w-]+)*\.(com|org|net|io|co|edu|de|eu)/")
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def load_source(dataset: str, reading: Reading) -> Source:
    """The source that `dataset` refers to; what a folder holds tells its kind. Raises UserError with the next move."""
    path = Path(os.path.expanduser(dataset))  # unlike Path's, it leaves ~nobody as it is
    if path.name in ("", ".."):  # what lies above has names of its own
        path = path.resolve()
    if dataset == "synthetic":
        splits = {split: Dataset.from_list(draw_split(split), features=ROW) for split in SPLIT_SIZES}
        return Source(splits, list(SPECIES), "synthetic flowers of ten invented species", is_published=True)
    if dataset == "oxford_flowers102":
        return load_hub(HUB_REPOSITORY, reading)
    if os.path.isdir(path):  # unlike Path.is_dir, False for names that no file system takes
        return load_folder(path, reading)
    if os.path.isfile(path):
        return load_file(path, reading)
    if os.path.exists(path):  # reading a pipe would wait for ever
        raise UserError(f"--dataset {dataset}: is a device or pipe; give a folder or a file")
    return load_elsewhere(dataset, path, reading)


def load_elsewhere(dataset: str, path: Path, reading: Reading) -> Source:
    """A data set of the hub; UserError for what is no path."""
    if ADDRESS.match(dataset):
        raise UserError(f"--dataset {dataset}: is a web address; download it, unpack it, and give the folder")
    if HUB_ID.fullmatch(dataset) and not os.path.isdir(path.parent):
        return load_hub_dataset(dataset, reading, load_folder)
    if os.path.islink(path):
        raise UserError(f"--dataset {dataset}: is a link to nowhere ({os.readlink(path)}); give the folder itself")
    names = os.listdir(path.parent) if os.path.isdir(path.parent) and os.access(path.parent, os.R_OK) else []
    near = get_close_matches(path.name, names, n=1)
    hint = f"; did you mean {printable(str(path.parent / near[0]))}?" if near else ""
    raise UserError(
        f"--dataset {printable(dataset[:200])}: no such folder or file; give a folder, a table, owner/name of the hub, "
        f"oxford_flowers102 or synthetic{hint}"
    )


def load_file(path: Path, reading: Reading) -> Source:
    """A table of labels or one parquet file; UserError for any other file."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return load_parquet_files(path.parent, [path], reading)
    if suffix in TABLES:
        folder, excluded = survey(path.parent)
        if not folder.num_images:  # annotations/labels.csv beside images/
            folder, excluded = survey(path.absolute().parent.parent)
        return load_tables([path], folder, excluded, reading)
    if suffix in ARCHIVES:
        raise UserError(
            f"--dataset {path}: is an archive; unpack it first: {unpack_command(path)}, and give the folder it makes"
        )
    kind = "an image" if is_image_name(path) else "a file"
    raise UserError(f"--dataset {path}: is {kind}; give the folder that holds the class folders, or a table of labels")


def load_folder(path: Path, reading: Reading) -> Source:
    folder, excluded = survey(path)
    if reading.streaming:
        return stream_parquet_folder(folder, reading)
    if folder.find("arrow"):
        return load_saved_dataset(folder, reading)
    if release := find_release(folder):
        note = [] if release.path == path else [f"{path} holds {release.name}, which is used"]
        return load_official_release(release.path, reading.allow_missing)._replace(notes=note)
    files = folder.find("parquet")
    not_in_classes = copy.deepcopy(excluded)
    try:
        layout = read_layout(folder, not_in_classes)
    except UserError:
        if not any(map(has_images, files)):
            raise
        layout = Layout(folder, folder)
    has_classes = len(layout.names) > 1
    parquet = next((file for file in files if has_images(file, by_path=not has_classes)), None)
    if parquet and has_classes:
        problem = f"has {len(layout.names)} class folders and parquet files with images ({parquet.name})"
        move = f"move one of the two elsewhere, or {give_one([layout.root.path, parquet.parent])}"
        raise UserError(f"{path}: {problem}; {move}")
    if parquet:
        return load_parquet_files(path, files, reading)
    if not has_classes or reading.label_column is not None:
        for place in (layout.root, with_parent_tables(layout.root)):
            if tables := find_label_tables(place):
                return load_tables(tables, place, excluded, reading)
        if not layout.names and files and not folder.num_images:
            return load_parquet_files(path, files, reading)  # raises with the columns that there are
        if reading.label_column is not None and layout.names:
            problem = f"no table of file names and labels lies in {path}"
            move = "give it with --dataset TABLE, or leave the option out: the class folders are the labels"
            raise UserError(f"--label-column {reading.label_column}: {problem}; {move}")
        if not layout.names or (not has_classes and find_boxes(folder)):
            raise UserError("; ".join([describe_flat(folder), *not_in_classes.lines()]))
    return load_class_folders(layout, not_in_classes, reading)


def load_ood_images(folder: Path, class_names: Sequence[str] = ()) -> Dataset:
    """The images in a folder, whatever they show; the label 0 means nothing. What is not used is logged.

    Also if folders have names of classes, whose images make any rate too low.
    """
    folder = Path(os.path.expanduser(folder))
    if not folder.is_dir():
        raise UserError(f"--ood {folder}: is no folder; give a folder of images without the classes")
    found, excluded = survey(folder)
    add_unused(found, excluded)
    keys = {*map(name_key, class_names)}
    if known := [below.path.name for below in found.walk() if below.num_images and name_key(below.path.name) in keys]:
        reason = "the model knows these plants, whose images make the rates too low; leave them out"
        logger.warning("--ood %s: has folders named as classes are: %s; %s", folder, some(known), reason)
    if not found.num_images:
        move = "give a folder of images without the classes"
        raise UserError("; ".join([f"--ood {folder}: no images found there", *excluded.lines(), move]))
    for line in excluded.lines():
        logger.warning("--ood %s: %s", folder, line)
    return build_rows((path, 0, os.path.relpath(path, folder), "") for path in found.list_images())

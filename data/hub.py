"""Data sets of images from the hub, at one commit."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

import datasets
from datasets import load_dataset_builder
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from config.training_config import TrainingConfig
from data.arrow import read_tables
from data.oxford_flowers import OFFICIAL_SIZES
from data.parquet import choose_splits, load_complete
from data.rows import Reading, Source, count_images
from data.survey import ARCHIVES
from utils.hub_utils import explain_hub_error
from utils.image_utils import SUFFIXES
from utils.logging_utils import UserError, first_line

HUB_REPOSITORY = "Donghyun99/Oxford-Flower-102"
OFFICIAL_REVISION = TrainingConfig.dataset_revision  # of HUB_REPOSITORY, the default of --dataset-revision
COMMIT = re.compile(r"[0-9a-f]{40}")


def load_hub(repository: str, reading: Reading) -> Source:
    """Oxford Flowers 102 from the hub, whole."""
    source = _load(repository, reading.dataset_revision, reading)
    if (sizes := {split: count_images(rows) for split, rows in source.splits.items()}) != OFFICIAL_SIZES:
        move = "give the official revision with --dataset-revision"
        raise UserError(f"{source.description}: has {sizes} images, expected {OFFICIAL_SIZES}; {move}")
    return source


def load_hub_dataset(repository: str, reading: Reading, load_folder: Callable[[Path, Reading], Source]) -> Source:
    """Any data set of images, `owner/name`, at the revision that was asked for or at its current commit.

    Image files are downloaded and read by `load_folder`, as those of a local folder; tables and archives by `datasets`.
    Raises UserError in one sentence.
    """
    revision, is_cached = reading.dataset_revision, False
    asked = None if revision == OFFICIAL_REVISION else revision
    try:
        with _explaining(repository, asked):
            info = HfApi().dataset_info(repository, revision=asked)
        revision, names = info.sha or "", [file.rfilename for file in info.siblings or ()]
    except UserError:
        if not COMMIT.fullmatch(asked or ""):
            raise
        names, is_cached = _list_cached(repository, revision), True  # without a network
    suffixes = {PurePath(name).suffix.lower() for name in names}
    if not suffixes & {*SUFFIXES} or suffixes & {".parquet", ".arrow", *ARCHIVES}:
        return _load(repository, revision, reading)  # without a network, `datasets` may have it in its cache
    with _explaining(repository, revision):
        folder = snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=is_cached)
    where = f"hub data set {repository} at {revision[:12]}"
    return load_folder(Path(folder), reading)._replace(description=where, revision=revision)


def _list_cached(repository: str, revision: str) -> list[str]:
    """Names of the files of a commit in the cache of the hub; none of one whose download broke off."""
    try:
        folder = snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return []
    return [path.name for path in Path(folder).rglob("*")]


def _load(repository: str, revision: str, reading: Reading) -> Source:
    with _explaining(repository, revision):
        loaded = load_complete(functools.partial(load_dataset_builder, repository, revision=revision))
    where = f"hub data set {repository} at {revision[:12]}"
    splits, warnings = choose_splits(loaded, where)
    # Where the library puts files of a data set; their tables name them by path.
    caches = [Path(constants.HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)]
    return read_tables(splits, reading, where, dict.fromkeys(splits, caches), (), warnings)._replace(revision=revision)


@contextlib.contextmanager
def _explaining(repository: str, revision: str | None) -> Iterator[None]:
    """An error of the hub or of `datasets` becomes a UserError with what to do about it."""
    try:
        yield
    except Exception as error:  # they raise a dozen kinds; a UserError is raised again as it is
        move = "if its download broke off, run the same command again; else give --dataset FOLDER with the images"
        problem = f"cannot be loaded ({first_line(error.__cause__ or error)}); {move}"
        if "config name" in str(error).lower():
            get = f"hf download {repository} --repo-type dataset --local-dir FOLDER"
            problem = f"has several configurations; download one and give its folder: {get} ({first_line(error)})"
        reason, _ = explain_hub_error(error, "--dataset", revision, problem)
        raise UserError(f"--dataset {repository}: {reason}") from error

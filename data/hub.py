"""Data sets of images from the hub, at one commit."""

import functools
import re
from collections.abc import Callable
from pathlib import Path, PurePath

import datasets
from datasets import DatasetDict, load_dataset
from huggingface_hub import HfApi, constants, errors, snapshot_download

from config.training_config import TrainingConfig
from data.arrow import read_tables
from data.classes import OFFICIAL_SIZES
from data.parquet import load_complete, name_splits
from data.rows import Reading, Source, count_images
from data.survey import ARCHIVES
from utils.image_utils import SUFFIXES
from utils.logging_utils import UserError, causes_of, first_line

HUB_REPOSITORY = "Donghyun99/Oxford-Flower-102"
OFFICIAL_REVISION = TrainingConfig.dataset_revision  # of HUB_REPOSITORY, the default of --dataset-revision
COMMIT = re.compile(r"[0-9a-f]{40}")


def load_hub(repository: str, reading: Reading) -> Source:
    """Oxford Flowers 102 from the hub, whole."""
    source = _load(repository, reading.dataset_revision, reading)
    if (sizes := {split: count_images(rows) for split, rows in source.splits.items()}) != OFFICIAL_SIZES:
        raise UserError(
            f"{source.description}: has {sizes} images, expected {OFFICIAL_SIZES}; give the official revision with "
            "--dataset-revision"
        )
    return source


def load_hub_dataset(repository: str, reading: Reading, load_folder: Callable[[Path, Reading], Source]) -> Source:
    """Any data set of images, `owner/name`, at the revision that was asked for or at its current commit.

    Image files are downloaded and read by `load_folder`, as those of a local folder; tables and archives by `datasets`.
    Raises UserError in one sentence.
    """
    revision = reading.dataset_revision
    asked = None if revision == OFFICIAL_REVISION else revision
    try:
        info = HfApi().dataset_info(repository, revision=asked)
    except Exception as error:
        if not COMMIT.fullmatch(asked or ""):
            raise _explain(error, repository, asked) from error
        return _load(repository, revision, reading)  # without a network, `datasets` may have it in its cache
    revision = info.sha or ""
    suffixes = {PurePath(file.rfilename).suffix.lower() for file in info.siblings or ()}
    if not suffixes & {*SUFFIXES} or suffixes & {".parquet", ".arrow", *ARCHIVES}:
        return _load(repository, revision, reading)
    try:
        folder = snapshot_download(repository, repo_type="dataset", revision=revision)
    except Exception as error:
        raise _explain(error, repository, revision) from error
    where = f"hub data set {repository} at {revision[:12]}"
    return load_folder(Path(folder), reading)._replace(description=where, revision=revision)


def _load(repository: str, revision: str, reading: Reading) -> Source:
    try:
        loaded = load_complete(functools.partial(load_dataset, repository, revision=revision))
    except Exception as error:  # the library and the hub raise a dozen kinds
        raise _explain(error, repository, revision) from error
    where = f"hub data set {repository} at {revision[:12]}"
    splits, warnings = name_splits(loaded if isinstance(loaded, DatasetDict) else {"train": loaded}, where)
    # Where the library puts files of a data set; their tables name them by path.
    caches = [Path(constants.HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)]
    return read_tables(splits, reading, where, dict.fromkeys(splits, caches), (), warnings)._replace(revision=revision)


def _explain(error: Exception, repository: str, revision: str | None) -> UserError:
    """What the user can do about an error of the hub or of `datasets`."""
    causes = list(causes_of(error))
    statuses = [getattr(getattr(cause, "response", None), "status_code", 0) for cause in causes]
    status = next(filter(None, statuses), 0)
    name = f"data set {repository}"
    # `datasets` tells a gated repository by the text of an error of its own.
    if any(isinstance(cause, errors.GatedRepoError) or "gated dataset" in str(cause) for cause in causes):
        page = f"https://huggingface.co/datasets/{repository}"
        return UserError(f"{name} is gated; accept its terms at {page} and set HF_TOKEN")
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in causes):
        return UserError(f"--dataset-revision {revision}: {name} has no such revision; see its commits on the hub")
    if status in (401, 403, 404):
        return UserError(
            f"--dataset {repository}: no such folder here, and no such data set on the hub, or it is private; check "
            "the name, or set HF_TOKEN"
        )
    if status == 429 or status >= 500:
        return UserError(f"{name}: the hub answers {status}; try again later")
    if "config name" in str(error).lower():
        return UserError(
            f"{name} has several configurations; download one and give its folder: hf download {repository} "
            f"--repo-type dataset --local-dir FOLDER ({first_line(error)})"
        )
    at = f" at revision {revision}" if revision else ""
    return UserError(
        f"{name}{at} cannot be loaded ({first_line(error.__cause__ or error)}); check the network and HF_TOKEN, or "
        "give --dataset FOLDER with the images"
    )

"""Parquet files and data sets that `datasets` saved, read as memory-mapped Arrow or as a stream."""

import contextlib
import functools
import glob
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features

from data.arrow import read_tables
from data.arrow_columns import FIRST_ROWS, find_image_column, find_images, find_label_column, kind_of
from data.class_names import folders_above
from data.columns import split_of_file
from data.labels import split_of
from data.layout import give_one
from data.rows import SPLITS, Reading, Source, allow_incomplete, by_key
from data.sizes import CheckedDownloads, check_sizes
from data.streaming import Stream
from data.survey import Folder
from utils.image_utils import printable
from utils.logging_utils import UserError, first_line, logger, some

SERIES = re.compile(r"(.+?)-(\d+)-of-(\d+)(-\w+)?")  # the files of a split: train-00000-of-00004.parquet
SAVED = ("dataset_dict.json", "dataset_info.json")  # what save_to_disk writes, of several splits and of one


def has_images(file: Path, by_path: bool = True) -> bool:
    """Whether a parquet file has a column of images, or, with `by_path`, of paths of images beside one of labels.

    Decided by its schema and the first values of texts and bytes. Raises UserError for a file that is not parquet.
    """
    features = _read_features(file)
    found = find_images(features, functools.partial(_read_head, file))
    if not found or kind_of(features[found[0]]) == "image":
        return bool(found)
    kinds = [kind_of(feature) for name, feature in features.items() if name not in found]
    return by_path and any(kind in ("class", "text", "number") for kind in kinds)


def load_parquet_files(path: Path, files: Sequence[Path], reading: Reading) -> Source:
    """Parquet files in the folder `path` or below; names of files and folders tell splits. Raises UserError."""
    where = f"parquet file {files[0]}" if len(files) == 1 else f"parquet folder {path}"
    with_images = [file for file in files if has_images(file)] or files[:1]  # whose columns the error then lists
    others = [file for file in files if file not in with_images]
    by_split, warnings = assign_splits(with_images, path, reading.allow_missing)
    warnings += _warn_unused("have no images and are not used", path, others)
    splits = {split: _read_files(where, parts) for split, parts in by_split.items()}
    roots = {split: list(dict.fromkeys([*(file.parent for file in parts), path])) for split, parts in by_split.items()}
    return read_tables(splits, reading, where, roots, folders_above(path), warnings)


def stream_parquet_folder(folder: Folder, reading: Reading) -> Source:
    """The parquet files of a folder with the train images streamed; the labels must be ClassLabels."""
    path, files = folder.path, folder.find("parquet")
    if not files:
        raise UserError(f"--streaming true: {path} has no parquet files, and nothing else is streamed; use false")
    by_split, warnings = assign_splits(files, path, reading.allow_missing)
    if missing := [split for split in SPLITS if split not in by_split]:
        problem = f"{path} has no parquet file for {' and '.join(missing)}, and none is cut from a stream"
        raise UserError(f"--streaming true: {problem}; give files or folders such names, or use false")
    train_files = by_split.pop("train")
    where = f"stream of {len(train_files):,} parquet files in {path}"
    splits = {split: _read_files(where, parts) for split, parts in by_split.items()}
    first = splits["validation"]
    image = find_image_column(first, where)
    if kind_of(first.features[image]) == "text":
        raise UserError(f"--streaming true: {path} holds paths of images and no images; use false")
    label = find_label_column(first, image, reading.label_column, where)
    tables = {str(file): _read_features(file) for file in train_files}
    tables |= {split: rows.features for split, rows in splits.items()}
    names = {name: getattr(features.get(label), "names", ()) for name, features in tables.items()}
    expected = names[str(train_files[0])]
    if not expected:
        raise UserError(f"--streaming true: labels in {path} have no names; write them as a ClassLabel, or use false")
    if other := next((name for name in names if names[name] != expected), None):
        problem = f"the label names of {other} in {path} differ from those of train, or are in another order"
        raise UserError(f"--streaming true: {problem}; write all with the same ClassLabel")
    with _explaining(where):
        check_sizes(train_files)
    for file in train_files:
        labels = pyarrow.parquet.read_table(file, columns=[label]).column(label).unique().to_pylist()
        if odd := {*labels} - {*range(len(expected))}:
            problem = f"has the label {odd.pop()}, expected 0 to {len(expected) - 1}"
            raise UserError(f"{file}: {problem}; leave images without a label out")
    source = read_tables(splits, reading, where, {split: [path] for split in splits}, warnings=warnings)
    if len(source.class_names) < len(expected) or splits.keys() - source.splits.keys():
        raise UserError(f"--streaming true: {'; '.join(source.warnings)}; write the files otherwise, or use false")
    with _explaining(where, "write the files again, all alike"):
        return source._replace(splits={"train": Stream(train_files, reading.seed, (image, label)), **source.splits})


def load_saved_dataset(folder: Folder, reading: Reading) -> Source:
    """A folder that save_to_disk of `datasets` wrote, or one that holds it alone. Raises UserError in one sentence."""
    found = [below.path for name in SAVED for below in folder.walk() if name in chain(*below.files.values())]
    if not found:
        raise UserError(
            f"{folder.path}: {printable(folder.find('arrow')[0].name)} is an Arrow file without its description; "
            "expected is a folder written by save_to_disk, or write parquet: Dataset.from_file(...).to_parquet(...)"
        )
    path, where = found[0], f"saved data set {found[0]}"
    with _explaining(where, "save it again, or write parquet with to_parquet"):
        check_sizes(folder.find("arrow"))
        saved = datasets.load_from_disk(str(path))
    splits, warnings = choose_splits(saved if isinstance(saved, DatasetDict) else {"train": saved}, where)
    splits = {split: rows.with_format(None) for split, rows in splits.items()}
    return read_tables(splits, reading, where, {split: [path] for split in splits}, folders_above(path), warnings)


# ---- splits


def choose_splits(tables: Mapping[str, Dataset], where: str) -> tuple[dict[str, Dataset], list[str]]:
    """(the tables as train, validation and test, warnings of those that are not used); one alone is train."""
    if len(tables) == 1 and split_of(next(iter(tables))) in (None, "train"):
        return {"train": next(iter(tables.values()))}, []
    found: dict[str, str] = {}
    listed = ", ".join(map(printable, tables))
    for name in tables:
        if (split := split_of(name)) in found:
            raise UserError(
                f"{where}: {found[split]} and {name} are both taken for {split}; rename one, it has {listed}"
            )
        found |= {split: name} if split else {}
    if "train" not in found:
        raise UserError(f"{where}: no split is called train, it has {listed}; rename the one to learn from")
    unused = [name for name in tables if name not in found.values()]
    warnings = [f"splits that are not used: {some(unused, 10)}"] if unused else []
    return {split: tables[found[split]] for split in SPLITS if split in found}, warnings


def assign_splits(files: Sequence[Path], path: Path, allow_missing: bool) -> tuple[dict[str, list[Path]], list[str]]:
    """(files of each split, warnings): by the word in a file's name, else in a folder's; without any, all is train.

    Raises UserError without a file for train, and for a series of files that is not complete.
    """
    warnings = _check_series(files, allow_missing)
    found = by_key((split_of_file(file, path) if len(files) > 1 else "train", file) for file in sorted(files))
    unnamed = found.pop("", [])
    if "train" in found:
        warnings += _warn_unused("have no split in their names and are not used", path, unnamed)
    elif not unnamed:
        move = "give files or folders names that begin with train, validation and test"
        raise UserError(f"{path}: no parquet file for train, only for {' and '.join(found)}; {move}")
    found.setdefault("train", unnamed)
    names = [file.name if split_of_file(file, file.parent) else str(file) for file in found["train"]]
    folders = max(by_key((name, file.parent) for name, file in zip(names, found["train"])).values(), key=len)
    if len(folders) > 1:
        raise UserError(f"{path}: holds {len(folders)} data sets; {give_one(folders)}")  # configurations of one
    return {split: found[split] for split in SPLITS if split in found}, warnings


def _check_series(files: Sequence[Path], allow_missing: bool) -> list[str]:
    """Warnings of numbered files that are missing. Raises UserError for these unless they are allowed."""
    series = Counter(
        (file.parent / found[1], int(found[3])) for file in files if (found := SERIES.fullmatch(file.stem))
    )
    return [
        allow_incomplete(f"{name}-*-of-{expected:05d}: {count} of {expected} files are there", allow_missing)
        for (name, expected), count in series.items()
        if count < expected
    ]


def _warn_unused(what: str, path: Path, files: Sequence[Path]) -> list[str]:
    listed = some(str(file.relative_to(path)) for file in files)
    return [f"{len(files):,} parquet files {what}: {listed}"] if files else []


# ---- files


@contextlib.contextmanager
def _explaining(where: str, move: str = "write it again") -> Iterator[None]:
    """An error of Arrow or of `datasets` becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: cannot be read ({first_line(error.__cause__ or error)}); {move}") from error


def _read_features(file: Path) -> Features:
    with _explaining(f"parquet file {file}"):
        schema = pyarrow.parquet.read_schema(file)
        if repeated := [name for name, count in Counter(schema.names).items() if count > 1]:
            raise UserError(f"{file}: two columns are called {printable(repeated[0])}; rename one")
        return Features.from_arrow_schema(schema)


def _read_head(file: Path, name: str) -> pyarrow.ChunkedArray:
    """The first rows of a column."""
    with _explaining(f"parquet file {file}, column {name}"):
        table = pyarrow.parquet.ParquetFile(file)
        batches = islice(table.iter_batches(FIRST_ROWS, columns=[name]), 1)
        return pyarrow.chunked_array([batch.column(name) for batch in batches], table.schema_arrow.field(name).type)


def _read_files(where: str, files: Sequence[Path]) -> Dataset:
    filled = [file for file in files if pyarrow.parquet.read_metadata(file).num_rows]
    if not filled:
        raise UserError(f"{where}: {printable(files[0].name)} has no rows; write it again with images")
    with _explaining(where, "write the files again, all alike"):
        names = [glob.escape(str(file)) for file in filled]
        return load_complete(functools.partial(datasets.load_dataset_builder, "parquet", data_files=names))["train"]


def load_complete(find_builder: Callable[[], datasets.DatasetBuilder]) -> DatasetDict:
    """The splits of a data set from the cache of `datasets`; if they are corrupted there, they are built again.

    Raises UserError for files that unpack to far more than they are.
    """

    def load(**options) -> DatasetDict:
        builder = find_builder()
        local = datasets.DownloadConfig(use_etag=False)
        downloads = CheckedDownloads(download_config=local, base_path=builder.base_path)
        builder.download_and_prepare(dl_manager=downloads, **options)
        loaded = builder.as_dataset()
        for split, rows in loaded.items():  # a file that is cut short between two batches is read without an error
            if len(rows) != (expected := builder.info.splits[split].num_examples):
                raise ValueError(f"{len(rows)} of {expected} rows are there")
        return loaded

    try:
        return load()
    except (ValueError, OSError) as error:  # of Arrow and of JSON; any other cause comes again
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        for info in cache.glob("*/*/*/*/dataset_info.json"):
            try:
                datasets.DatasetInfo.from_directory(str(info.parent))
            except (ValueError, TypeError, AttributeError):  # with it, the library could not begin
                info.unlink()
        loaded = load(download_mode="reuse_cache_if_exists")
        logger.warning("a corrupted table in the cache %s is built again (%s)", cache, first_line(error))
        return loaded

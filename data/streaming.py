"""Train images streamed from parquet files, for a disk without room for them as Arrow as well."""

import glob
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet
import torch
from accelerate.data_loader import DataLoaderShard
from datasets import Image, load_dataset
from torch.utils.data import IterableDataset, get_worker_info

from data.sampling import augmentation_seed
from utils.logging_utils import UserError

SHUFFLE_BUFFER = 1000  # rows, not decoded, out of which the next is drawn; in each loader worker


class Stream(IterableDataset):
    """Rows like those of data/sources.py, without end: pass after pass, each in another order.

    A rank reads every n-th file, and its loader's workers every n-th of these. `set_rank` and `skip_steps` decide which
    rows come; with the same numbers of ranks and workers, they are the same rows in the same order.
    """

    def __init__(self, files: Sequence[Path], seed: int, columns: tuple[str, str] = ("image", "label")):
        rows = {file: pyarrow.parquet.read_metadata(file).num_rows for file in files}
        self.files = [file for file in files if rows[file]] or list(files)  # a reader of empty ones would find nothing
        self.seed = seed
        self.is_augmented = False
        self.columns = columns  # of images and labels
        self.num_images = sum(rows.values())
        self.set_rank(0, 1, 1)
        self._open()  # what cannot be streamed is an error here

    def set_rank(self, rank: int, world_size: int, total_batch_size: int) -> None:
        """Read the files of this rank, and its part of the images that all ranks take in a step."""
        if len(self.files) < world_size:
            found = f"{len(self.files)} parquet files with images for {world_size} ranks"
            move = "each rank needs its own file; write the images to more files, or start fewer ranks"
            raise UserError(f"--streaming true: {found}, and {move}")
        self.rank_files = self.files[rank::world_size]
        self.batch_size = total_batch_size // world_size + (rank < total_batch_size % world_size)
        self.skip_steps(0)

    def skip_steps(self, steps: int) -> None:
        """Skip the samples of the first `steps` steps: in each worker as many, and in the loader the rest."""
        self.steps_done = steps

    def build_loader(self, num_workers: int, device: torch.device, **options) -> DataLoaderShard:
        """This rank's batches, from the step after `skip_steps`; `options` are those of torch's DataLoader.

        As accelerate prepares one, except that rank 0 would read for all ranks, and the last batch would be filled up.
        """
        workers = min(num_workers, len(self.rank_files))  # each worker reads whole files
        return DataLoaderShard(
            self,
            device=device,
            skip_batches=self.steps_done % max(workers, 1),  # it asks its workers in turn, beginning with the first
            batch_size=self.batch_size,
            num_workers=workers,
            generator=torch.Generator(),  # by default it draws from the random state that a checkpoint restored
            **options,
        )

    def head(self, count: int) -> list[dict]:
        """The first rows of the rank's files, in their order."""
        return [_with_id(row) for row in itertools.islice(self._open(), count)]

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        skipped = self.steps_done // (info.num_workers if info else 1) * self.batch_size
        for number, row in enumerate(map(_with_id, itertools.islice(self._repeat(), skipped, None)), skipped):
            seed = augmentation_seed(self.seed, number, row["id"]) if self.is_augmented else None
            yield row if seed is None else row | {"augmentation_seed": seed}

    def _repeat(self) -> Iterator[dict]:
        rows = self._open()
        for number in itertools.count():
            row = None
            # In a worker, `datasets` gives the rows of the worker's files only.
            for row in rows.shuffle(seed=self.seed + number, buffer_size=SHUFFLE_BUFFER):
                yield row
            if row is None:
                files = f"{len(self.rank_files)} files that begin with {self.rank_files[0]}"
                reason = "emptied since the start; put them back, and re-run the same command"
                raise UserError(f"--streaming true: a reader found no images in the {files}: {reason}")

    def _open(self):
        files = [glob.escape(str(file)) for file in self.rank_files]
        rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
        rows = rows.select_columns([*self.columns]).cast_column(self.columns[0], Image(decode=False))
        return rows.rename_columns({old: new for old, new in zip(self.columns, ("image", "label")) if old != new})


def _with_id(row: dict) -> dict:
    """The id is the image's path if the file has one, else a hash of its bytes.

    An image without bytes is empty: the path of a file from elsewhere may be that of any file, so it is never opened.
    """
    path, contents = (row["image"] or {}).get("path"), (row["image"] or {}).get("bytes") or b""
    image_id = path or hashlib.sha256(contents).hexdigest()[:16]
    return row | {"image": {"bytes": contents, "path": path}, "id": image_id}

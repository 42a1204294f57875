"""Train images read from parquet files as they are needed, where a disk has no room for them as Arrow as well."""

import glob
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet
from datasets import Image, load_dataset
from torch.utils.data import IterableDataset, get_worker_info

from utils.logging_utils import UserError

BUFFER = 1000  # rows, not decoded, out of which the next is drawn; of each loader's worker


class Stream(IterableDataset):
    """Rows like those of data/dataset.py, for ever: pass after pass, each in another order.

    A process has every n-th file to itself, and its loader's workers have every n-th of these. `share` and `skip_steps`
    say which rows; then the same numbers of processes and workers give the same rows in the same order.
    """

    def __init__(self, files: Sequence[Path], seed: int):
        rows = {file: pyarrow.parquet.read_metadata(file).num_rows for file in files}
        self.files = [file for file in files if rows[file]] or list(files)  # who has only empty ones finds nothing
        self.seed = seed
        self.images = sum(rows.values())
        self.set_rank(0, 1, 1)
        self.features = self._open().features

    def set_rank(self, process: int, processes: int, images_per_step: int) -> None:
        """Which of several processes this is, and how many images all of them take in a step."""
        if len(self.files) < processes:
            raise UserError(
                f"--streaming true: {len(self.files)} parquet files with images for {processes} processes, and each "
                "needs one of its own; write the images to more files, or start fewer processes"
            )
        self.own = self.files[process::processes]
        self.batch_size = images_per_step // processes + (process < images_per_step % processes)
        self.skip_steps(0)

    def skip_steps(self, step: int) -> None:
        """Skip the samples of the first `step` steps; the loader skips the rest of a round, `batches_to_skip`."""
        self.steps_done = step

    def batches_to_skip(self, workers: int) -> int:
        """Batches that a loader still gives of those before `skip_steps`: it begins with its first worker again."""
        return self.steps_done % max(workers, 1)

    def head(self, count: int) -> list[dict]:
        """The first rows of the files, in their order."""
        return [_row(row) for row in itertools.islice(self._open(), count)]

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        batches_done = self.steps_done // workers  # a loader asks its workers in turn
        yield from map(_row, itertools.islice(self._endless(), batches_done * self.batch_size, None))

    def _endless(self) -> Iterator[dict]:
        rows = self._open()
        for number in itertools.count():
            row = None
            for row in rows.shuffle(seed=self.seed + number, buffer_size=BUFFER):  # in a worker, of its files alone
                yield row
            if row is None:
                raise UserError(
                    f"--streaming true: no images for one reader of the {len(self.own)} files from {self.own[0]} on: "
                    "emptied since the start; put them back, and give the same command again"
                )

    def _open(self):
        rows = load_dataset(
            "parquet", data_files=[glob.escape(str(file)) for file in self.own], split="train", streaming=True
        )
        return rows.select_columns(["image", "label"]).cast_column("image", Image(decode=False))


def _row(row: dict) -> dict:
    """With an id: the image's path where the file has one, else a hash of its bytes."""
    return row | {"id": row["image"]["path"] or hashlib.sha256(row["image"]["bytes"] or b"").hexdigest()[:16]}

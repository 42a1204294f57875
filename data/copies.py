"""Images with the same content: only those of equal size are read, and a file's hash is kept from start to start."""

import contextlib
import hashlib
import io
import itertools
import os
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import datasets
import pyarrow
import pyarrow.compute

from utils.image_utils import is_image_start

CACHE_FILE = "image_hashes.sqlite3"  # in the library's cache folder
BLOCK = 2**20  # bytes read at a time
TASK = 100  # files that a thread hashes in one go
READERS = 8  # threads: hashing and reading release the GIL, and a network disk answers several at once
NOT_AN_IMAGE = b""  # in place of a hash: equal broken files are unreadable images, not copies of a plant
SELECT = "SELECT hash FROM hashes WHERE path = ? AND size = ? AND modified_ns = ?"
CREATE = "CREATE TABLE IF NOT EXISTS hashes (path TEXT PRIMARY KEY, size INTEGER, modified_ns INTEGER, hash BLOB)"
INSERT = "INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?)"


class ImageFile(NamedTuple):
    path: str
    size: int  # bytes
    modified_ns: int


def find_copies(splits: Iterable[datasets.Dataset]) -> list[list[int]]:
    """The numbers of the images of each content that occurs twice; images are counted over all splits."""
    splits = list(splits)
    sizes, files = _read_sizes(splits)
    counts = Counter(sizes)
    shared = [number for number, size in enumerate(sizes) if size and counts[size] > 1]
    hashes = hash_files({number: files[number] for number in shared if number in files})
    hashes |= _hash_rows(splits, {number for number in shared if number not in files})
    same = defaultdict(list)
    for number in shared:
        if hashes.get(number, NOT_AN_IMAGE) != NOT_AN_IMAGE:
            same[hashes[number]].append(number)
    return [numbers for numbers in same.values() if len(numbers) > 1]


def _read_sizes(splits: Sequence[datasets.Dataset]) -> tuple[list[int], dict[int, ImageFile]]:
    """Bytes of each image, 0 if it cannot be found; the images that are files."""
    sizes: list[int] = []
    files = {}
    for contents, paths in _batches(splits):
        for size, path in zip(pyarrow.compute.binary_length(contents).to_pylist(), paths.to_pylist()):
            if size is None and path:
                with contextlib.suppress(OSError, ValueError):
                    path = path if os.path.isabs(path) else os.path.abspath(path)
                    status = os.stat(path)
                    size = status.st_size
                    files[len(sizes)] = ImageFile(path, size, status.st_mtime_ns)
            sizes.append(size or 0)
    return sizes, files


def _batches(splits: Iterable[datasets.Dataset]) -> Iterator[tuple[pyarrow.Array, pyarrow.Array]]:
    """(contents, paths) of a thousand rows at a time, as they lie in the memory-mapped files."""
    for rows in splits:
        for table in rows.select_columns("image").with_format("arrow").iter(batch_size=1000):
            for images in table.column("image").chunks:
                yield (pyarrow.compute.struct_field(images, "bytes"), pyarrow.compute.struct_field(images, "path"))


def _hash_rows(splits: Sequence[datasets.Dataset], wanted: set[int]) -> dict[int, bytes]:
    """Hashes of images whose bytes are in the rows; one at a time is read."""
    numbers = itertools.count()
    return {
        number: _hash(io.BytesIO(content.as_buffer()))
        for contents, _ in (_batches(splits) if wanted else ())
        for content, number in zip(contents, numbers)
        if number in wanted
    }


def _hash(file: BinaryIO) -> bytes:
    """sha256 of an image; NOT_AN_IMAGE for a file of another kind."""
    if not is_image_start(start := file.read(16)):
        return NOT_AN_IMAGE
    digest = hashlib.sha256(start)
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.digest()


def hash_files(files: dict[int, ImageFile]) -> dict[int, bytes]:
    """The hash of each file that can be read, from the cache where it is known. Keys are those of `files`."""
    hashes: dict[int, bytes] = {}
    with contextlib.suppress(sqlite3.Error, OSError), _open_cache() as cache:
        cache.execute("BEGIN")  # or each look-up would lock the file anew: 20 s for a million
        for number, file in files.items():
            if (kept := cache.execute(SELECT, file).fetchone()) and isinstance(kept[0], bytes):
                hashes[number] = kept[0]
    missing = [number for number in files if number not in hashes]
    paths = [files[number].path for number in missing]
    tasks = [paths[start : start + TASK] for start in range(0, len(paths), TASK)]
    with ThreadPoolExecutor(READERS) as pool:
        contents = itertools.chain(*pool.map(lambda paths: list(map(_hash_file, paths)), tasks))
        found = {number: content for number, content in zip(missing, contents) if content is not None}
    with contextlib.suppress(sqlite3.Error, OSError), _open_cache() as cache, cache:
        cache.executemany(INSERT, [(*files[number], content) for number, content in found.items()])
    return hashes | found


def _hash_file(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return _hash(file)
    except OSError:
        return None


@contextlib.contextmanager
def _open_cache() -> Iterator[sqlite3.Connection]:
    """The hashes of earlier starts; a cache that cannot be used only makes a start slower."""
    folder = f"{datasets.config.HF_DATASETS_CACHE}"
    os.makedirs(folder, exist_ok=True)
    with contextlib.closing(sqlite3.connect(os.path.join(folder, CACHE_FILE), timeout=5)) as cache:
        cache.execute(CREATE)
        yield cache

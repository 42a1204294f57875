"""Images with the same content: only those of equal size are read, and a file's hash is kept from start to start."""

import contextlib
import hashlib
import io
import itertools
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import datasets
import pyarrow
import pyarrow.compute

from data.rows import by_key
from utils.image_utils import is_image_start

CACHE_FILE = "image_hashes.sqlite3"  # in the library's cache folder
BLOCK = 2**20  # bytes read at a time
TASK = 100  # files that a thread hashes in one go
READERS = 8  # threads: hashing and reading release the GIL, and a network disk answers several at once
NOT_AN_IMAGE = b""  # in place of a hash: equal broken files are unreadable images, not copies of a plant
SELECT = "SELECT hash FROM hashes WHERE path = ? AND size = ? AND modified_ns = ?"
CREATE = "CREATE TABLE IF NOT EXISTS hashes (path TEXT PRIMARY KEY, size INTEGER, modified_ns INTEGER, hash BLOB)"
INSERT = "INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?)"
ImageFile = tuple[str, int, int]  # path, size in bytes, time of the last change in ns


def find_copies(rows: datasets.Dataset) -> list[list[int]]:
    """The numbers of the images of each content that occurs twice."""
    sizes, files = _read_sizes(rows)
    counts = Counter(sizes)
    shared = [number for number, size in enumerate(sizes) if size and counts[size] > 1]
    stored = {number for number in shared if number not in files}
    of_files = _hash_files([files[number] for number in shared if number in files])
    hashes = {number: of_files.get(file, NOT_AN_IMAGE) for number, file in files.items()}
    contents = ((number, content) for number, (content, _) in enumerate(_read_images(rows)) if number in stored)
    hashes |= {number: _hash(io.BytesIO(content.as_buffer())) for number, content in contents} if stored else {}
    same = by_key((hashes[number], number) for number in shared)
    return [numbers for content, numbers in same.items() if content != NOT_AN_IMAGE and len(numbers) > 1]


def _read_sizes(rows: datasets.Dataset) -> tuple[list[int], dict[int, ImageFile]]:
    """Bytes of each image, 0 if it cannot be found; the images that are files."""
    sizes: list[int] = []
    files = {}
    for content, path in _read_images(rows):
        size = content.as_buffer().size if content.is_valid else 0
        if path and not content.is_valid:
            with contextlib.suppress(OSError, ValueError):
                path = path if os.path.isabs(path) else os.path.abspath(path)
                status = os.stat(path)
                size = status.st_size
                files[len(sizes)] = (path, size, status.st_mtime_ns)
        sizes.append(size)
    return sizes, files


def _read_images(rows: datasets.Dataset) -> Iterator[tuple[pyarrow.BinaryScalar, str | None]]:
    """(content, path) of each image, as they lie in the memory-mapped files."""
    for table in rows.select_columns("image").with_format("arrow").iter(batch_size=1000):
        for images in table.column("image").chunks:
            contents, paths = (pyarrow.compute.struct_field(images, name) for name in ("bytes", "path"))
            yield from zip(contents, paths.to_pylist())


def _hash(file: BinaryIO) -> bytes:
    """sha256 of an image; NOT_AN_IMAGE for a file of another kind."""
    if not is_image_start(start := file.read(16)):
        return NOT_AN_IMAGE
    digest = hashlib.sha256(start)
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.digest()


def _hash_files(files: list[ImageFile]) -> dict[ImageFile, bytes]:
    """The hash of each file that can be read, from the cache where it is known."""
    known: dict[ImageFile, bytes] = {}
    with contextlib.suppress(sqlite3.Error, OSError), _open_cache() as cache:
        cache.execute("BEGIN")  # or each look-up would lock the file anew: 20 s for a million
        for file in files:
            if (kept := cache.execute(SELECT, file).fetchone()) and isinstance(kept[0], bytes):
                known[file] = kept[0]
    missing = [file for file in files if file not in known]
    tasks = [missing[start : start + TASK] for start in range(0, len(missing), TASK)]
    with ThreadPoolExecutor(READERS) as pool:
        contents = itertools.chain(*pool.map(lambda files: [_hash_file(path) for path, *_ in files], tasks))
        found = {file: content for file, content in zip(missing, contents) if content is not None}
    with contextlib.suppress(sqlite3.Error, OSError), _open_cache() as cache, cache:
        cache.executemany(INSERT, [(*file, content) for file, content in found.items()])
    return known | found


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

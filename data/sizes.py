"""What files of a data set unpack to, known before they are taken in: some would fill memory, and the disk."""

import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from datasets import DownloadManager
from datasets.utils.extract import Extractor

from utils.image_utils import is_image_name
from utils.logging_utils import UserError

MAX_UNFOLDING = 50  # times the size of the files is what they may take: images are compressed already
ANY_UNFOLDING = 100_000_000  # bytes that they may take in any case


class CheckedDownloads(DownloadManager):
    """The files of a data set, from the hub or local ones, of which `check_sizes` takes all."""

    def download(self, url_or_urls):
        found = super().download(url_or_urls)
        # "gzip://name::path" is what a reader unpacks while it reads.
        paths = {Path(str(path).rpartition("::")[2]) for path in self.downloaded_paths.values()}
        check_sizes(sorted(path for path in paths if not is_image_name(path)))
        return found


def check_sizes(files: Sequence[Path]) -> None:
    """Raise UserError for files that unpack to far more than they are, each alone or all together."""
    written, total = sum(file.stat().st_size for file in files), 0
    for number, file in enumerate(files):
        of_file, alone = file.stat().st_size, 0
        for size in _read_sizes(file):
            alone, total = alone + size, total + size
            for stored, unpacked in ((of_file, alone), (written, total)):
                if unpacked > max(MAX_UNFOLDING * stored, ANY_UNFOLDING):
                    sizes = f"{stored / 1e6:,.1f} MB unpack to {unpacked / 1e6:,.0f} MB or more, as images do not"
                    where = f"{file}, file {number + 1} of {len(files)}" if len(files) > 1 else file
                    move = "write it again with JPEG or PNG images, remove it, or use another data set"
                    raise UserError(f"{where}: {sizes}; {move}")


def _read_sizes(file: Path) -> Iterator[int]:
    with open(file, "rb") as opened:
        kind = {b"PAR1": "parquet", b"ARRO": "arrow"}.get(opened.read(4))
    kind = kind or ("stream" if file.suffix == ".arrow" else Extractor.infer_extractor_format(file))
    if kind == "parquet":
        yield from _read_parquet_sizes(file)
    elif kind == "arrow":
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_file(source) as batches:
            yield from (batches.get_batch(at).get_total_buffer_size() for at in range(batches.num_record_batches))
    elif kind == "stream":
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as batches:
            yield from (batch.get_total_buffer_size() for batch in batches)
    elif kind == "zip":
        with zipfile.ZipFile(file) as archive:
            yield from (entry.file_size for entry in archive.infolist())
    elif kind == "tar":
        with tarfile.open(file) as archive:
            yield from (entry.size for entry in archive)
    elif kind:
        with fsspec.open(file, compression=kind) as unpacked:
            while chunk := unpacked.read(1 << 20):
                yield len(chunk)


def _read_parquet_sizes(file: Path) -> Iterator[int]:
    """Bytes of the columns of a parquet file; a value that repeats is stored once, and read where it may matter."""
    metadata, repeated = pyarrow.parquet.read_metadata(file), set()
    columns = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    much = MAX_UNFOLDING * file.stat().st_size
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk, column in zip(map(group.column, range(metadata.num_columns)), columns):
            is_text = column.physical_type == "BYTE_ARRAY"
            yield max(chunk.total_uncompressed_size, (4 if is_text else max(column.length, 8)) * chunk.num_values)
            if is_text and chunk.has_dictionary_page and chunk.num_values * chunk.total_uncompressed_size > much:
                repeated.add(chunk.path_in_schema)
    reader = pyarrow.parquet.ParquetFile(file, read_dictionary=[*repeated])
    for batch in reader.iter_batches(1000, columns=[*repeated]) if repeated else ():
        yield sum(map(_unfolded_size, batch.columns))


def _unfolded_size(column: pyarrow.Array) -> int:
    """Bytes of the values of a column in which those that repeat are stored once."""
    if pyarrow.types.is_dictionary(column.type):
        sizes = pyarrow.compute.binary_length(column.dictionary).take(column.indices)
        return pyarrow.compute.sum(sizes.cast(pyarrow.int64())).as_py() or 0
    return sum(map(_unfolded_size, column.flatten())) if pyarrow.types.is_struct(column.type) else column.nbytes

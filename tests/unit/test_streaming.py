"""Images streamed from parquet files: each once a pass, whatever the number of readers, and a step to resume from."""

import itertools

import datasets
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value

from config.cli import parse_config
from data.dataset import build_datasets, sample_rows
from data.streaming import Stream
from utils.logging_utils import UserError

NAMES = ["oak", "ash", "elm"]


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    """`datasets` sleeps for seconds at the end of a pass."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def write_parquet(folder, files: int, rows: int, names=NAMES, path="{split}/{number}.jpg", columns=("image", "label")):
    """`files` train files of `rows` images each that do not open, one file each for val and test."""
    features = {columns[0]: Image(decode=False), columns[1]: ClassLabel(names=names) if names else "int64"}
    features = Features(features) if names else None
    folder.mkdir(exist_ok=True)
    for split, count in (("train", files), ("validation", 1), ("test", 1)):
        for file in range(count):
            numbers = range(file * rows, (file + 1) * rows) if split == "train" else range(5)
            images = [
                {
                    columns[0]: {
                        "bytes": f"{split} {number}".encode(),
                        "path": path.format(split=split, number=number),
                    },
                    columns[1]: number % 3,
                }
                for number in numbers
            ]
            table = (
                Dataset.from_list(images, features=features)
                if images
                else Dataset.from_dict({name: [] for name in columns}, features=features)
            )
            table.to_parquet(folder / f"{split}-{file:02d}.parquet")
    return sorted(folder.glob("train-*.parquet"))


def ids_of(stream: Stream, workers: int, batches: int) -> list[list[str]]:
    loader = stream.build_loader(workers, torch.device("cpu"), collate_fn=lambda rows: [row["id"] for row in rows])
    return list(itertools.islice(loader, batches))


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 2), (3, 0)])
def test_a_pass_gives_every_image_once_to_one_reader(world_size, workers, tmp_path):
    files = write_parquet(tmp_path / "images", 12, 5)  # each reader has the same number of files, so passes end alike
    passes = [[], []]
    for rank in range(world_size):
        stream = Stream(files, seed=1)
        stream.set_rank(rank, world_size, world_size)
        assert stream.num_images == 60 and stream.batch_size == 1
        batches = ids_of(stream, workers, 120 // world_size)
        found = list(itertools.chain(*batches))
        passes[0] += found[: 60 // world_size]
        passes[1] += found[60 // world_size :]
    expected = sorted(f"train/{number}.jpg" for number in range(60))
    assert sorted(passes[0]) == sorted(passes[1]) == expected
    assert passes[0] != passes[1] and passes[0] != expected  # each in an order of its own


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_it_resumes_after_any_step(workers, tmp_path):
    """In the second pass too: a rank has 30 images, and takes 4 of the 7 of a step."""
    files = write_parquet(tmp_path / "images", 6, 10)
    stream = Stream(files, seed=1)
    stream.set_rank(0, 2, 7)
    whole = ids_of(stream, workers, 14)
    assert {len(batch) for batch in whole} == {4}
    for step in (1, 4, 11):
        stream.skip_steps(step)
        assert ids_of(stream, workers, 14 - step) == whole[step:]


def test_images_of_a_step_are_distributed_across_ranks(tmp_path):
    files = write_parquet(tmp_path / "images", 3, 2)
    stream, sizes = Stream(files, seed=1), []
    for rank in range(3):
        stream.set_rank(rank, 3, 16)
        sizes.append(stream.batch_size)
        assert stream.rank_files == [files[rank]]
    assert sizes == [6, 5, 5]
    with pytest.raises(
        UserError, match="3 parquet files with images for 4 ranks, and each rank needs its own file; write the"
    ):
        stream.set_rank(0, 4, 16)


def test_files_without_images_are_ignored(tmp_path):
    files = write_parquet(tmp_path / "images", 3, 2)
    empty = write_parquet(tmp_path / "empty", 1, 0)
    stream = Stream([files[0], *empty, *files[1:]], seed=1)
    assert stream.files == files and stream.num_images == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_files_emptied_since_the_start_are_an_error_and_not_read_for_ever(workers, tmp_path):
    stream = Stream(write_parquet(tmp_path / "images", 2, 3), seed=1)
    stream.set_rank(0, 1, 3)
    write_parquet(tmp_path / "images", 2, 0)
    with pytest.raises(UserError, match="a reader found no images in the 2 files that begin with .*train-00.parquet"):
        ids_of(stream, workers, 1)


def test_names_in_another_order_are_not_mixed_up(tmp_path):
    write_parquet(tmp_path / "images", 2, 4)
    write_parquet(tmp_path / "other", 1, 4, names=NAMES[::-1])
    for name in ("validation-00.parquet", "test-00.parquet"):
        (tmp_path / "other" / name).rename(tmp_path / "images" / name)
    with pytest.raises(
        UserError, match="the label names of validation in .* differ from those of train, or are in another order"
    ):
        streamed(tmp_path / "images")


@pytest.mark.parametrize(
    ("names", "splits", "words"),
    [
        (["Rosa canina", "rosa_canina", "elm"], (), "'rosa_canina' are read as one class, 'Rosa canina'; rename one"),
        (NAMES, ("test",), "test has no labels, so it cannot be scored: its 5 images are not used; .*, or use false"),
    ],
)
def test_labels_that_a_stream_cannot_have_are_refused(names, splits, words, tmp_path):
    """Its numbers are those of the file: were two classes one, they would be the labels of others."""
    write_parquet(tmp_path / "images", 2, 4, names=names)
    for split in splits:
        file = tmp_path / "images" / f"{split}-00.parquet"
        rows = Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
        rows.map(lambda row: row | {"label": -1}).to_parquet(file)
    with pytest.raises(UserError, match=f"--streaming true: .*{words}"):
        streamed(tmp_path / "images")
    assert len(build_datasets(parse_config(["--dataset", str(tmp_path / "images")])).test)


def test_the_id_of_an_image_without_a_path_is_a_hash_of_its_bytes(tmp_path):
    files = write_parquet(tmp_path / "images", 2, 3, path="")
    found = [row["id"] for row in Stream(files, seed=1).head(10)]
    assert len(set(found)) == 6 and all(len(image_id) == 16 for image_id in found)


def streamed(folder, *flags):
    return build_datasets(parse_config(["--dataset", str(folder), "--streaming", "true", "--max-steps", "5", *flags]))


def test_the_other_splits_are_read_as_usual_and_a_changed_file_is_noticed(tmp_path):
    folder = tmp_path / "images [1]*"  # no pattern
    write_parquet(folder, 4, 5)
    assert len(build_datasets(parse_config(["--dataset", str(folder)])).train) == 20
    data = streamed(folder)
    assert (data.num_train, len(data.validation), len(data.test)) == (20, 5, 5) and data.class_names == NAMES
    assert data.source == f"stream of 4 parquet files in {folder}"
    assert data.train.head(2)[1] == {
        "image": {"bytes": b"train 1", "path": "train/1.jpg"},
        "label": 1,
        "id": "train/1.jpg",
    }
    assert sample_rows(data.train, 3)["id"] == ["train/0.jpg", "train/1.jpg", "train/2.jpg"]
    before = data.fingerprint()
    assert streamed(folder).fingerprint() == before
    write_parquet(folder, 4, 6)
    assert streamed(folder).fingerprint() != before


BAD = [
    ({"names": None}, "have no names; write them as a ClassLabel, or use false"),
    ({"rows": 0}, "split train has no images; add some"),
]


@pytest.mark.parametrize(("how", "words"), BAD, ids=[words[:20] for _, words in BAD])
def test_bad_files(how, words, tmp_path):
    write_parquet(tmp_path / "images", **({"files": 2, "rows": 4} | how))
    with pytest.raises(UserError, match=words):
        streamed(tmp_path / "images")


def test_a_stream_needs_all_splits_and_images_in_its_files(tmp_path):
    write_parquet(tmp_path / "images", 2, 4)
    for file in (tmp_path / "images").rglob("validation*"):
        file.unlink()
    with pytest.raises(UserError, match="no parquet file for validation, and none is cut from a stream; give files"):
        streamed(tmp_path / "images")
    features = Features({"image": Value("string"), "label": ClassLabel(names=NAMES)})
    for split in ("train", "validation", "test"):
        rows = Dataset.from_list([{"image": f"{n}.png", "label": n} for n in range(3)], features=features)
        rows.to_parquet(tmp_path / "paths" / f"{split}.parquet")
    with pytest.raises(UserError, match="holds paths of images and no images; use false"):
        streamed(tmp_path / "paths")


def test_columns_of_other_names_are_streamed(tmp_path):
    write_parquet(tmp_path / "images", 2, 4, columns=("picture", "species"))
    data = streamed(tmp_path / "images")
    assert data.class_names == NAMES and {*data.train.head(1)[0]} == {"image", "label", "id"}


def test_an_unknown_label_in_a_streamed_file_is_an_error(tmp_path):
    files = write_parquet(tmp_path / "images", 2, 4)
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=NAMES)})
    Dataset.from_list([{"image": {"bytes": b"x", "path": None}, "label": -1}], features=features).to_parquet(files[1])
    with pytest.raises(
        UserError, match="train-01.parquet: has the label -1, expected 0 to 2; leave images without a label out"
    ):
        streamed(tmp_path / "images")


def test_a_path_in_a_streamed_row_is_never_opened(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=NAMES)})
    rows = [{"image": {"bytes": None, "path": str(secret)}, "label": 0}, {"image": None, "label": 1}]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    assert [row["image"]["bytes"] for row in Stream([tmp_path / "train.parquet"], seed=1).head(2)] == [b"", b""]


def test_a_streamed_file_that_unpacks_to_much_is_refused(tmp_path):
    files = write_parquet(tmp_path / "images", 2, 4)
    schema = pyarrow.parquet.read_schema(files[1])
    table = pyarrow.Table.from_arrays([pyarrow.nulls(13_000_000, each.type) for each in schema], schema=schema)
    pyarrow.parquet.write_table(table, files[1])
    with pytest.raises(UserError, match="train-01.parquet, file 2 of 2: 0.. MB unpack to 1.. MB or more"):
        streamed(tmp_path / "images")


def test_other_folders_are_not_streamed(image_folder):
    with pytest.raises(UserError, match="has no parquet files, and nothing else is streamed; use false"):
        streamed(image_folder({"oak": 3, "ash": 3}))


def test_a_file_that_is_not_parquet(tmp_path):
    files = write_parquet(tmp_path / "images", 2, 4)
    files[1].write_bytes(b"torn")
    with pytest.raises(UserError, match="train-01.parquet: cannot be read .*; write it again"):
        streamed(tmp_path / "images")

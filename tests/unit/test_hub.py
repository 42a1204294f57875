"""Image data sets of the hub: the real code of huggingface_hub and `datasets`, with a hub in this process."""

import errno
import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import datasets
import httpx
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from huggingface_hub import HfFileSystem, constants

from config.cli import parse_config
from data import hub
from data.dataset import build_datasets
from data.rows import SPLITS
from tests.fake_hub import FakeHub
from utils.image_utils import png_image
from utils.logging_utils import UserError

NAMES = ["ash", "elm", "oak"]
HALVES = [NAMES[number % 3] for number in range(12)]


def png(number: int) -> bytes:
    import PIL.Image

    return png_image(PIL.Image.new("RGB", (30 + number, 20), (number * 9 % 256, 90, 30)))["bytes"]


def build(*argv):
    return build_datasets(parse_config(list(argv)))


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The folder of the data set owner/plants on the hub; empty caches."""
    served = FakeHub(tmp_path / "repository", "owner/plants", "datasets")
    served.folder.mkdir()
    served.commit = hashlib.sha1(str(tmp_path).encode()).hexdigest()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between retries
    HfFileSystem.clear_instance_cache()
    with served.serving():
        yield served


def put_images(folder: Path, count: int, start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        (folder / f"{number}.png").write_bytes(png(number))


def put_table(file: Path, count: int = 12, labels: list | None = None, start: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in range(start, start + count)]
    feature = ClassLabel(names=NAMES) if labels is None else Value("string")
    columns = {"image": images, "label": labels or [number % 3 for number in range(count)]}
    Dataset.from_dict(columns, features=Features({"image": Image(), "label": feature})).to_parquet(file)


def sizes(data) -> dict[str, int]:
    return {split: len(getattr(data, split)) for split in SPLITS}


def test_image_files_of_the_hub_are_read_as_those_of_a_folder(repository):
    put_images(repository.folder / "train" / "Acer" / "campestre", 5)
    put_images(repository.folder / "train" / "Acer" / "rubrum", 5, 10)
    put_images(repository.folder / "train" / "Quercus" / "alba", 5, 20)
    put_images(repository.folder / "Validation" / "Acer" / "campestre", 1, 30)
    (repository.folder / "README.md").write_text("---\nlicense: mit\n---\nPlants")
    data = build("--dataset", "owner/plants")
    assert data.class_names == ["Acer campestre", "Acer rubrum", "Quercus alba"]
    assert (
        sizes(data) == {"train": 12, "validation": 1, "test": 3} and "train/Acer/campestre/0.png" in data.train["id"][:]
    )
    assert (
        data.source == f"hub data set owner/plants at {repository.commit[:12]}" and data.revision == repository.commit
    )
    asked = sum("/resolve/" in path for path in repository.requests)
    assert build("--dataset", "owner/plants").fingerprint() == data.fingerprint()
    assert sum("/resolve/" in path for path in repository.requests) == asked  # nothing is downloaded again


def test_names_and_labels_beside_image_files_of_the_hub(repository):
    put_images(repository.folder / "images", 12)
    rows = [f"{number}.png,{name}" for number, name in enumerate(HALVES)]
    (repository.folder / "labels.csv").write_text("\n".join(["file,species", *rows]))
    assert build("--dataset", "owner/plants").class_names == NAMES
    (repository.folder / "labels.csv").unlink()
    (repository.folder / "images").rename(repository.folder / "1")
    put_images(repository.folder / "2", 6, 20)
    (repository.folder / "cat_to_name.json").write_text(json.dumps({"1": "pink rose", "2": "blue iris"}))
    repository.commit = "d" * 40
    data = build("--dataset", "owner/plants")
    assert data.class_names == ["pink rose", "blue iris"] and data.revision == "d" * 40


def test_parquet_files_of_the_hub(repository):
    put_table(repository.folder / "data" / "train-00000-of-00001.parquet")
    put_table(repository.folder / "data" / "test-00000-of-00001.parquet", 6, start=20)
    put_images(repository.folder / "assets", 1, 50)  # a banner
    data = build("--dataset", "owner/plants")
    assert data.class_names == NAMES and sizes(data) == {"train": 9, "validation": 3, "test": 6}
    assert data.revision == repository.commit
    pinned = ("--dataset", "owner/plants", "--dataset-revision", repository.commit)
    assert build(*pinned).fingerprint() == data.fingerprint()
    repository.fail = lambda request: repository.refuse(503)
    assert build(*pinned).fingerprint() == data.fingerprint()  # from the cache


def test_a_parquet_file_with_labels_as_text(repository):
    put_table(repository.folder / "train.parquet", labels=HALVES)
    assert build("--dataset", "owner/plants").class_names == NAMES


def lost(request):
    raise httpx.ConnectError("no route")


def full(request):
    raise OSError(errno.ENOSPC, "No space left on device")


def forbidden(request):
    raise PermissionError(errno.EACCES, "Permission denied", "/cache/x")


def locked(request):
    raise UserError("the lock x.lock was not free within 3,600 s; end the program that holds it")


def refusing(status: int, code: str = "", part: str = "/api"):
    return lambda request: FakeHub.refuse(None, status, code) if part in request.url.path else None


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (refusing(404, "RepoNotFound"), "--dataset owner/plants: is no folder here and not on the hub"),
        (refusing(401, "GatedRepo"), "owner/plants: is gated .*; accept its terms on the hub, and check that HF_TOKEN"),
        (refusing(403, "GatedRepo", "/resolve/"), "owner/plants: is gated .*; accept its terms"),
        (refusing(404, "RevisionNotFound"), "owner/plants: has no revision main; check --dataset-revision"),
        (refusing(401), "check the name, and that HF_TOKEN may read it"),
        (refusing(503), "owner/plants: the hub answers 503 for .*; try again later, or give a folder"),
        (refusing(429, part="/resolve/"), "the hub answers 429 for .*; try again later"),
        (lost, r"the hub cannot be reached \(.*\); check the network, or give a folder"),
        (full, "owner/plants: cannot be put in the cache, HF_HOME .*; free space"),
        (locked, "^the lock x.lock was not free within 3,600 s; end the program that holds it$"),
        (forbidden, "owner/plants: cannot be put in the cache, HF_HOME ./cache/x: Permission denied.; choose a place"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_problems_of_the_hub_are_one_sentence(kind, fail, words, repository):
    if kind == "images":
        put_images(repository.folder / "ash", 4)
        put_images(repository.folder / "elm", 4, 10)
    else:
        put_table(repository.folder / "train.parquet")
    repository.fail = fail
    with pytest.raises(UserError, match=words):
        build("--dataset", "owner/plants", "--dataset-revision", "main")


@pytest.mark.parametrize("is_offline", [True, False])
@pytest.mark.parametrize("is_whole", [True, False])
def test_image_files_of_a_commit_are_read_from_the_cache_without_a_network(
    is_whole, is_offline, repository, monkeypatch
):
    put_images(repository.folder / "ash", 6)
    put_images(repository.folder / "elm", 6, 10)
    pinned = ("--dataset", "owner/plants", "--dataset-revision", repository.commit)
    if not is_whole:
        repository.fail = lambda request: lost(request) if request.url.path.endswith("elm/15.png") else None
        with pytest.raises(UserError, match="the hub cannot be reached"):
            build(*pinned)
    else:
        before = build(*pinned)
    if is_offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    repository.fail = lost
    if is_whole:
        data = build(*pinned)
        assert (data.fingerprint(), data.revision) == (before.fingerprint(), repository.commit)
    else:  # fewer images would be another split
        assert [*Path(constants.HF_HUB_CACHE).rglob("ash/*.png")]
        with pytest.raises(UserError, match="is not whole in the cache|the hub cannot be reached"):
            build(*pinned)


def test_without_a_network_image_files_are_refused_with_a_sentence(repository):
    put_images(repository.folder / "ash", 4)
    repository.fail = lost
    for revision in ("main", repository.commit):
        with pytest.raises(
            UserError, match="the hub cannot be reached .*; check the network, or give a folder that holds it"
        ):
            build("--dataset", "owner/plants", "--dataset-revision", revision)


def put_text(folder):
    (folder / "train.jsonl").write_text('{"text": "a", "label": 0}\n')


def put_folds(folder):
    for fold in ("fold_a", "fold_b"):
        put_table(folder / f"{fold}.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: fold_a, path: fold_a.parquet}\n"
        "  - {split: fold_b, path: fold_b.parquet}\n---\n"
    )


def put_configurations(folder):
    for name in ("a", "b"):
        put_table(folder / name / "train.parquet")
    listed = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("a", "b"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")


def put_broken(folder):
    (folder / "train.parquet").write_bytes(b"PAR1" + bytes(100))


@pytest.mark.parametrize(
    ("put", "words"),
    [
        (put_text, "no column of images among text, label"),
        (put_folds, "no split is called train, it has fold_a, fold_b"),
        (put_configurations, "has several configurations; download one and give"),
        (put_broken, r"cannot be loaded \(ArrowInvalid: .*parquet"),
        (lambda folder: (folder / "plants.py").write_text("import datasets"), "cannot be loaded .*scripts are no"),
        (lambda folder: put_images(folder, 3), "3 images lie here, none in a class folder"),
    ],
)  # fmt: skip
def test_data_sets_of_the_hub_that_cannot_be_used(put, words, repository):
    put(repository.folder)
    with pytest.raises(UserError, match=words):
        build("--dataset", "owner/plants")


def write_zip(file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ash/1.jpg", bytes(120_000_000))


def write_sparse_tar(file):
    with tarfile.open(file, "w") as archive:
        entry = tarfile.TarInfo("1.jpg")
        entry.size, entry.pax_headers = 512, {"GNU.sparse.size": "120000000", "GNU.sparse.map": "0,512"}
        archive.addfile(entry, io.BytesIO(bytes(512)))


def write_compressed(file):
    file.write_bytes(gzip.compress(b'{"image": 1, "label": 2}\n' * 5_000_000, 1))


def write_arrow_file(file):
    table = pyarrow.table({"image": [bytes(120_000_000)], "label": [1]})
    with pyarrow.ipc.new_file(file, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)


def write_parquet_file(file):
    nulls = {name: pyarrow.nulls(13_000_000, pyarrow.binary()) for name in ("image", "label")}
    pyarrow.parquet.write_table(pyarrow.table(nulls), file)


@pytest.mark.parametrize(
    ("name", "write_file"),
    [
        ("train.parquet", write_parquet_file),
        ("train.arrow", write_arrow_file),
        ("train.zip", write_zip),
        ("train.tar", write_sparse_tar),
        ("train.jsonl.gz", write_compressed),
    ],
)
def test_a_file_of_the_hub_that_unpacks_to_much_is_refused(name, write_file, repository):
    write_file(repository.folder / name)
    with pytest.raises(UserError, match=f"{name}: [0-9.]* MB unpack to 1.. MB or more, .* or use another data set"):
        build("--dataset", "owner/plants")


def test_a_path_in_a_table_of_the_hub_is_read_in_the_caches_alone(repository, tmp_path):
    (tmp_path / "secret.png").write_bytes(png(1))
    images = [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 6
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("string")})
    Dataset.from_dict({"image": images, "label": NAMES * 2}, features=features).to_parquet(
        repository.folder / "train.parquet"
    )
    with pytest.raises(UserError, match="6 images are named by paths outside the data set"):
        build("--dataset", "owner/plants")


def test_unreachable_hub_is_an_error_with_repository_and_next_move():
    with pytest.raises(
        UserError, match="--dataset Donghyun99/Oxford-Flower-102: at abc is not whole in the cache, and .*; unset it"
    ):
        build("--dataset-revision", "abc")


def test_hub_splits_of_another_size_are_an_error(monkeypatch):
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    rows = Dataset.from_dict({"image": [{"bytes": png(1), "path": None}], "label": [0]}, features=features)
    monkeypatch.setattr(hub, "load_complete", lambda find: DatasetDict(dict.fromkeys(SPLITS, rows)))
    with pytest.raises(UserError, match="has {.train.: 1, .* images, expected {.train.: 1020"):
        build()

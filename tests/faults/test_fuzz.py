"""Whatever comes in, what comes out is an answer or one clear sentence. `make fuzz` runs each ten minutes.

What it found is kept as tests of the code that was at fault.
"""

import json
import os
import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.cli import parse_config
from config.training_config import CONFIG_FILE, PRESETS, ConfigError, TrainingConfig, find_problems, find_range_problems
from data.labels import CLASS_NAMES, parse_reply, tidy_name
from runtime.checkpoint import MANIFEST, verify_checkpoint, write_manifest
from runtime.run_files import append_metrics, load_config, read_metrics, save_config, truncate_metrics
from tests.faults.corpus import contents
from utils.image_utils import ImageError, fit_image, open_image, read_image_size

SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))  # of each test
quiet = settings(deadline=None, max_examples=100, database=None, suppress_health_check=list(HealthCheck))
SEEDS = [data for name, (data, _) in contents().items() if 20 < len(data) < 20_000]
changes = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "repeat", "end"]),
        st.floats(0, 1),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])),
    ),
    max_size=6,
)


def fuzz(check: Callable[[], None]) -> None:
    """`check` with 100 examples, and again until the time is up."""
    ends = time.monotonic() + SECONDS
    check()
    while time.monotonic() < ends:
        check()


def changed(data: bytes, how) -> bytes:
    for kind, where, new in how:
        place = int(where * len(data))
        if kind == "set":
            data = data[:place] + new + data[place + len(new) :]
        elif kind == "cut":
            data = data[:place] + data[place + len(new) :]
        elif kind == "insert":
            data = data[:place] + new + data[place:]
        elif kind == "repeat":
            data = data[:place] + data[max(place - 200, 0) :]
        else:
            data = data[:place]
    return data


@pytest.mark.filterwarnings("ignore")
def test_the_image_opener():
    @quiet
    @given(st.sampled_from(SEEDS), changes)
    def check(seed, how):
        source = {"bytes": changed(seed, how), "path": "a photo.jpg"}
        began = time.monotonic()
        try:
            image = open_image(source)
            assert image.mode == "RGB" and read_image_size(source) == (image.height, image.width)
            fit_image(image, 28)
        except ImageError as error:
            assert str(error).startswith("a photo.jpg: ") and str(error).isprintable()
        assert time.monotonic() - began < 20

    fuzz(check)


FLAGS = [f"--{name.replace('_', '-')}" for name in TrainingConfig.__dataclass_fields__]
words = st.one_of(
    st.text(max_size=12),
    st.sampled_from([*FLAGS, *PRESETS, "--", "-", "none", "true", "nan", "inf", "-1", "0", "1e999", "0x10", "1_000"]),
    st.integers().map(str),
    st.floats().map(str),
    st.builds("{}={}".format, st.sampled_from(FLAGS), st.text(max_size=8)),
)


def test_the_config_parser(capsys):
    @quiet
    @given(st.lists(words, max_size=8))
    def check(argv):
        try:
            config = parse_config(argv)
            assert not list(find_problems(config))
        except SystemExit as stop:
            output = "".join(capsys.readouterr())
            assert (stop.code == 2 and "error: " in output) or (stop.code == 0 and "--help" in output)
        capsys.readouterr()

    fuzz(check)


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner)
)


def test_saved_configs(tmp_path):
    save_config(TrainingConfig(), tmp_path, {"class_names": ["oak"]})
    saved = (tmp_path / CONFIG_FILE).read_bytes()
    names = st.sampled_from([*TrainingConfig.__dataclass_fields__, "unknown"])

    @quiet
    @given(
        st.one_of(st.builds(changed, st.just(saved), changes), st.binary(), anything),
        st.dictionaries(names, anything, max_size=2),
    )
    def check(found, more):
        if not isinstance(found, bytes):
            found = json.dumps({"config": json.loads(saved)["config"] | more, "recorded": found}).encode()
        (tmp_path / CONFIG_FILE).write_bytes(found)
        try:
            config, recorded = load_config(tmp_path)
            assert not list(find_range_problems(config)) and isinstance(recorded, dict)
        except ConfigError as error:
            assert CONFIG_FILE in str(error)

    fuzz(check)


def test_metrics_and_manifests(tmp_path):
    (tmp_path / "x").write_text("x")
    write_manifest(tmp_path)
    manifest = (tmp_path / MANIFEST).read_bytes()
    texts = st.one_of(
        st.builds(changed, st.just(manifest), changes),
        st.binary(),
        anything.map(lambda value: json.dumps(value).encode()),
    )

    @quiet
    @given(texts)
    def check(found):
        (tmp_path / MANIFEST).write_bytes(found)
        assert verify_checkpoint(tmp_path) is None or str(verify_checkpoint(tmp_path))
        (tmp_path / "metrics.jsonl").write_bytes(found)
        before = read_metrics(tmp_path)
        append_metrics(tmp_path, {"step": 1})
        assert read_metrics(tmp_path) == [*before, {"step": 1}]
        truncate_metrics(tmp_path, tmp_path, 1)

    fuzz(check)


def test_the_label_reader():
    around = st.text(" .,;:!?\"'\n\t", max_size=4)

    @quiet
    @given(
        st.text(max_size=40), st.integers(0, len(CLASS_NAMES) - 1), around, around, st.booleans(), st.text(max_size=30)
    )
    def check(reply, index, before, after, upper, folder):
        found = parse_reply(reply, CLASS_NAMES)
        assert found is None or CLASS_NAMES[found][0].lower() in reply.lower()
        name = CLASS_NAMES[index].upper() if upper else CLASS_NAMES[index].replace(" ", "  ")
        assert parse_reply(f"{before}{name}{after}", CLASS_NAMES) == index
        assert tidy_name(tidy_name(folder)) == tidy_name(folder)
        assert parse_reply(reply, [folder, reply]) in (0, 1, None)

    fuzz(check)


def test_the_examples_are_files_of_many_kinds():
    assert len(SEEDS) > 40

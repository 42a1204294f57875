"""Whatever comes in, what comes out is an answer or one clear sentence. `make fuzz` runs each ten minutes.

What it found is kept as tests of the code that was at fault.
"""

import json
import os
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.cli import parse_config
from config.training_config import CONFIG_FILE, PRESETS, ConfigError, TrainingConfig, find_problems, find_range_problems
from data.labels import parse_reply, tidy_name
from data.oxford_flowers import CLASS_NAMES
from evaluation.calibration import Calibration
from evaluation.metrics import SplitScores, measure_split
from evaluation.model_card import read_reports
from evaluation.report import format_number, render
from evaluation.results import read_calibration, scores_schema
from models.callbacks import EarlyStopping
from models.checks import check_adapter
from models.trainable import lora_settings
from models.training_arguments import load_state
from runtime.checkpoint import MANIFEST, read_best, verify_checkpoint, write_manifest
from runtime.run_files import append_metrics, load_config, read_entries, read_metrics, save_config, truncate_metrics
from tests.faults.corpus import contents
from utils.image_utils import ImageError, fit_image, open_image, read_image_size
from utils.logging_utils import UserError

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


paths = st.lists(st.integers(0, 30), max_size=4)
odd = st.one_of(
    anything,
    st.sampled_from([-1, 10**400, 1e308, "", " ", "\ud800", [], {}, [[]], [None], {"": None}, True]),
    st.builds(lambda depth: json.loads("[" * depth + "]" * depth), st.integers(1, 300)),
)


def replaced(value, path, new):
    """`value` with what stands at a path, of positions, replaced; without it where `new` is None."""
    if not path or not isinstance(value, (dict, list)) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, copy = keys[path[0] % len(keys)], value.copy()
    if len(path) == 1 and new is None:
        del copy[key]
    else:
        copy[key] = replaced(value[key], path[1:], new)
    return copy


def broken(saved: dict):
    """Strategy: the bytes of a JSON object with a value replaced or lost, with bytes changed, or of anything."""
    text = json.dumps(saved).encode()
    return st.one_of(
        st.builds(lambda path, new: json.dumps(replaced(saved, path, new)).encode(), paths, odd),
        st.builds(changed, st.just(text), changes),
        st.binary(),
        anything.map(lambda value: json.dumps(value).encode()),
        st.sampled_from([b"[" * 200_000, json.dumps(saved).encode("utf-16"), b'{"a":' * 100_000, b"9" * 5000]),
    )


CALIBRATION = Calibration(1.5, 0.4, 0.95, 20)
SCORED = {"adapter": "step 3, manifest abc", "dataset": "synthetic", "question": "What?"}


def test_calibrations(tmp_path):
    @quiet
    @given(broken(CALIBRATION._asdict() | {"scored": SCORED}))
    def check(found):
        (tmp_path / "calibration.json").write_bytes(found)
        try:
            read = read_calibration(tmp_path, SCORED["adapter"])
            assert read is None or 0 <= read.measure_ood(np.array([[0.0, -3.0]]))["abstention_rate"] <= 1
        except UserError as error:
            assert "calibration.json: cannot be used (" in str(error) and "make it again" in str(error)

    fuzz(check)


def test_reports(tmp_path):
    """What is read can be written into a model card and a report."""
    scores = SplitScores(["a", "b", "c"], np.array([0, 1, 1]), np.log([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]))
    extra = {"split": "val", "per_token": False, "ood": {"noise": {"n": 4, "abstention_rate": 0.5}}}
    shares = {f"{name}_{key}": 0.5 for name in ("linear", "knn") for key in ("top1", "top5", "mean_per_class")}
    counts = {"advice": "use it", "tower_is_trained": True, "seconds": 1.5, "train_images": 4, "of_train_images": 9}
    noticed = {"score": "tower_knn", "threshold": 0.5, "kept": 0.95, "missing": None, "rates": {"known": 0.05}}
    noticed |= {"coverage": 0.9, "selective_accuracy": 0.97}
    extra |= {"probe": shares | counts, "none_of_these": noticed, "open_set": []}
    report = SCORED | extra | measure_split(scores, CALIBRATION, ["oak", "ash"])

    @quiet
    @given(broken(report))
    def check(found):
        (tmp_path / "eval_val.json").write_bytes(found)
        for read in read_reports(tmp_path, SCORED["adapter"], SCORED["dataset"]).values():
            assert "Classes, worst first" in render("class_tables.md.j2", report=read)
            assert render("trust_tables.md.j2", report=read)
            assert format_number(read["top1"]) and all(map(format_number, read["top1_interval"]))
            assert read["calibration"] is None or format_number(read["calibration"]["threshold"])

    fuzz(check)


def test_caches(tmp_path):
    entry = {"id": "a", "image": [3, "x"], "label": 1, "scores": [-1.0, -0.5]}
    path = tmp_path / "eval_val.scores.jsonl"

    @quiet
    @given(broken(SCORED), st.lists(broken(entry), max_size=3))
    def check(header, lines):
        path.write_bytes(b"\n".join([header, *lines, json.dumps(entry).encode()]))
        facts, entries = read_entries(path, scores_schema(2))
        assert facts is not None or not entries
        for found in entries:
            assert np.isfinite(np.array(found["scores"], float)).all() and len(found["scores"]) == 2
            assert found["label"] in (0, 1) and isinstance(found["id"], str)
        json.dumps([facts, *entries])

    fuzz(check)


def test_states_and_best(tmp_path):
    """A state that is taken for valid can be resumed from, as far as its own numbers go."""
    state = {"global_step": 2, "epoch": 0.5, "log_history": [{"step": 2, "eval_top1": 0.5, "eval_loss": 1.0}]}
    state |= {"total_flos": 1.0, "train_batch_size": 4, "stateful_callbacks": {"TrainerControl": {"args": {}}}}
    state |= {"logging_steps": 1, "eval_steps": 2, "save_steps": 2, "max_steps": 4}
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()

    @quiet
    @given(broken(state), broken({"step": 2, "eval_top1": 0.5, "eval_loss": 1.0}))
    def check(found, best):
        (folder / "trainer_state.json").write_bytes(found)
        (folder / "best.json").write_bytes(best)
        write_manifest(folder)
        if verify_checkpoint(folder) is not None:
            assert read_best(folder) is None
            return
        read = read_best(folder)
        assert read["step"] >= 0 and (read.get("eval_top1") or 0.0) < 2**70
        try:
            loaded = load_state(folder)
            assert loaded.global_step == 2 and loaded.total_flos + 1.0 > loaded.total_flos - 1e300
            assert not EarlyStopping(3, None, 10).is_over(loaded.log_history) or loaded.log_history
        except UserError as error:
            assert "trainer_state.json cannot be used (" in str(error)

    fuzz(check)


def test_adapter_configs(tmp_path):
    settings = lora_settings("adapter", 4, 32, 0.0)
    settings.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())

    @quiet
    @given(broken(saved))
    def check(found):
        path.write_bytes(found)
        try:
            check_adapter(tmp_path, settings)
            read = json.loads(found)
            assert all(read.get(name, saved[name]) == saved[name] for name in ("peft_type", "r", "lora_alpha"))
        except UserError as error:
            assert "its adapter_config.json is not that of the run's adapter (" in str(error) and len(str(error)) < 900

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

"""What a run holds is read by one schema check: kinds, ranges, depth, encoding; nothing else gets through."""

import json
import math
import os

import pytest

from config.training_config import ConfigError, TrainingConfig
from runtime import run_files
from runtime.run_files import (
    ANY,
    BEST_STEP,
    NAMES,
    TEXT,
    integer,
    load_config,
    number,
    read_entries,
    read_json,
    read_metrics,
)


@pytest.mark.parametrize(
    ("value", "schema", "words"),
    [
        ([], {"a": ANY}, "it must be an object, not []"),
        ({}, {"a": ANY}, "it lacks a"),
        ({"a": {"b": 1}}, {"a": {"b": TEXT}}, "a.b must be text, not 1"),
        ({"a": ["x", None]}, {"a": [TEXT]}, "a[1] must be text, not None"),
        ({"a": None}, {"a": [TEXT]}, "a must be a list, not None"),
        ({"a": True}, {"a": integer()}, "a must be a whole number from 0 to 9223372036854775808, not True"),
        ({"a": 2}, {"a": number(0, 1)}, "a must be a number from 0 to 1, not 2"),
        ({"a": math.nan}, {"a": number()}, "not nan"),
        ({"a": math.inf}, {"a": (number(), None)}, "not inf"),
        ({"a": 10**30}, {"a": number()}, "a must be a number"),  # numpy computes with none above 2**63
        ({"step": 2, "eval_top1": 1e308}, BEST_STEP, "eval_top1 must be a number from 0 to 1"),  # none would be better
        ({"a": 10**400}, {"a": number()}, "a must be a number from -1e+300 to 1e+300, not 1000"),
        ({"a": [[["x" * 99] * 9] * 9] * 9}, {"a": TEXT}, "a must be text, not [[['xxxxxxxxxxxx...xxxxxxxxxxxxx', "),
        ({"a": {"x": 1, "y": "z"}}, {"a": {str: integer()}}, "a.y must be a whole number"),
        *(
            ({"names": value}, {"names": NAMES}, "names must be a list of different names")
            for value in (None, "oak", [], ["oak", "oak"], ["oak", " "], [1, 2], ["oak", "\ud800"], ["a\ud800"])
        ),
    ],
)
def test_what_does_not_fit_is_reported_by_its_place(value, schema, words, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(ValueError) as raised:
        read_json(tmp_path / "x.json", schema)
    assert words in str(raised.value) and len(str(raised.value)) < 200


def test_what_fits_is_kept_and_what_no_one_asked_for_is_not(tmp_path):
    value = {"a": 1, "b": None, "other": {"deep": [1]}, "?": 2}
    (tmp_path / "x.json").write_text(json.dumps(value), encoding="utf-8-sig")  # as some editors save it
    schema = {"a": integer(), "b": (TEXT, None), "c?": TEXT}
    assert read_json(tmp_path / "x.json", schema) == {"a": 1, "b": None}
    assert read_json(tmp_path / "x.json", schema | {str: ANY}) == value


def deep(path):
    path.write_text("[" * 200_000)


def utf16(path):
    path.write_bytes('{"config": {}, "recorded": {}}'.encode("utf-16"))


def pipe(path):
    os.mkfifo(path)


def folder(path):
    path.mkdir()


def loop(path):
    path.symlink_to(path.name)


def device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("content", [deep, utf16, pipe, folder, loop, device])
def test_files_that_are_no_json(content, tmp_path):
    content(tmp_path / run_files.CONFIG_FILE)
    with pytest.raises(ConfigError, match=r"training_config.json: cannot be read as a run's config \(.*; restore the"):
        load_config(tmp_path)
    if content is not folder:
        content(tmp_path / run_files.METRICS_FILE)
    assert read_metrics(tmp_path) == []
    content(tmp_path / "cache.jsonl")
    assert read_entries(tmp_path / "cache.jsonl", {}) == (None, [])


def test_only_entries_that_fit_are_read_from_a_cache(tmp_path):
    entry = {"id": "a", "image": [1, "x"], "text": "oak"}
    wrong = [[], 5, "{", entry | {"id": []}, entry | {"text": None}, {"text": "oak"}]
    lines = [json.dumps({"model": "m"}), *map(json.dumps, [entry, *wrong, entry | {"id": "b", "more": 1}]), '{"id": "c']
    (tmp_path / "cache.jsonl").write_text("\n".join(lines))
    assert read_entries(tmp_path / "cache.jsonl", {"text": TEXT}) == ({"model": "m"}, [entry, entry | {"id": "b"}])
    (tmp_path / "cache.jsonl").write_text("\n".join(["[]", *lines[1:]]))  # entries of unknown facts are of no use
    assert read_entries(tmp_path / "cache.jsonl", {"text": TEXT}) == (None, [])


def test_metrics_keep_what_training_logged_though_it_is_not_finite(tmp_path):
    lines = [{"step": 1, "loss": None, "flops": 1.5}, {"step": 2, "eval_loss": math.inf}]
    for line in [*lines, {"step": -1}, {"step": 3, "loss": "low"}, {"step": 4, "loss": 10**400}]:
        run_files.append_metrics(tmp_path, line)
    assert read_metrics(tmp_path) == lines


def test_a_config_with_a_huge_number(tmp_path):
    run_files.save_config(TrainingConfig(), tmp_path, {})
    path = tmp_path / run_files.CONFIG_FILE
    path.write_text(path.read_text().replace('"learning_rate": 1e-05', f'"learning_rate": {10**400}'))
    with pytest.raises(ConfigError, match="cannot be read as a run's config"):
        load_config(tmp_path)

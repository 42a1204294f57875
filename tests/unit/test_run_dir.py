"""Where a run goes, and whether it resumes."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from config.cli import parse_config
from config.training_config import ConfigError
from runtime.distributed import Distributed
from runtime.run_dir import Run, check_same_facts, decide_run, open_run
from runtime.run_files import append_metrics, read_metrics, save_config, truncate_metrics


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(argv):
    """A run that was started with these flags and left."""
    return save(parse_config(argv))


def save(config) -> str:
    """The folder of this config's run, with the config in it."""
    folder = decide_run(config).folder
    folder.mkdir(parents=True, exist_ok=True)
    save_config(dataclasses.replace(config, output_dir=str(folder)), folder, {})
    return str(folder)


def test_default_folder_is_fresh_then_resumed_then_numbered():
    assert start(["--preset", "tiny"]) == "runs/tiny"
    again = decide_run(parse_config(["--preset", "tiny"]))
    assert (again.state, str(again.folder)) == ("interrupted", "runs/tiny")
    append_metrics("runs/tiny", {"step": 1, "completed": True})
    third = decide_run(parse_config(["--preset", "tiny"]))
    assert (third.state, str(third.folder)) == ("new", "runs/tiny-2")
    assert third.notes == ["runs/tiny is complete", "using runs/tiny-2"]


def test_another_config_takes_the_next_folder_and_says_why():
    start(["--preset", "tiny"])
    chosen = decide_run(parse_config(["--preset", "tiny", "--seed", "7"]))
    assert str(chosen.folder) == "runs/tiny-2"
    assert chosen.notes == ["runs/tiny has another config (seed: 42 -> 7)", "using runs/tiny-2"]


def test_what_leaves_the_mathematics_alone_is_only_mentioned():
    start(["--output-dir", "mine"])
    flags = ["--output-dir", "mine", "--logging-steps", "5", "--per-device-train-batch-size", "4",
             "--gradient-accumulation-steps", "4"]  # fmt: skip
    chosen = decide_run(parse_config(flags))
    assert chosen.state == "interrupted" and "logging_steps: 10 -> 5" in chosen.notes[0]


def test_an_explicit_folder_of_another_config_is_refused():
    start(["--output-dir", "mine"])
    with pytest.raises(ConfigError, match=r"another config \(lora_r: 16 -> 8; global batch size: 16 -> 32\)"):
        decide_run(parse_config(["--output-dir", "mine", "--lora-r", "8", "--gradient-accumulation-steps", "32"]))


@pytest.mark.parametrize(
    ("flags", "state", "words"),
    [
        (["--max-steps", "5"], "completed", ["mine is complete; give a new folder"]),
        (["--max-steps", "5", "--num-train-epochs", "9"], "completed", ["mine is complete"]),  # steps decide
        (["--max-steps", "9", "--num-train-epochs", "9"], "interrupted", ["resuming mine", "longer .*steps: 5 -> 9.:"]),
        (
            ["--max-steps", "9", "--lr-scheduler-type", "constant_with_warmup", "--warmup-steps", "2"],
            "interrupted",
            ["changed, as", "resuming mine; changed options that keep the result: max_steps: 5 -> 9"],
        ),
    ],
)
def test_a_completed_explicit_folder_is_kept_or_resumed_for_more_steps(flags, state, words):
    start(["--output-dir", "mine", "--max-steps", "5"])
    append_metrics("mine", {"step": 5, "completed": True})
    chosen = decide_run(parse_config(["--output-dir", "mine", "--allow-changed", *flags]))
    assert chosen.state == state and len(chosen.notes) == len(words), chosen.notes
    assert all(re.match(*pair) for pair in zip(words, chosen.notes)), chosen.notes


def test_a_sharded_run_is_used_with_whole_weights_and_resumes():
    """On one GPU, by all scripts but train.py."""
    flags = ["--output-dir", "mine", "--sharding", "fsdp", "--load-in-4bit", "false", "--trainable", "adapter"]
    assert Run.load(start(flags)).config.sharding == "none"
    assert decide_run(parse_config(flags)).notes == ["resuming mine"]


def test_a_run_of_before_the_default_revision_was_fixed(in_tmp):
    """Its config has null, or lacks the key: it resumes, or by what the sentence says."""
    start(["--output-dir", "mine", "--model-revision", "none"])
    with pytest.raises(ConfigError, match="model_revision: None -> .*; give a new folder, the old options to resume"):
        decide_run(parse_config(["--output-dir", "mine"]))
    assert decide_run(parse_config(["--output-dir", "mine", "--model-revision", "none"])).state == "interrupted"
    saved = json.loads((in_tmp / "mine" / "training_config.json").read_text())
    del saved["config"]["model_revision"]
    (in_tmp / "mine" / "training_config.json").write_text(json.dumps(saved))
    assert decide_run(parse_config(["--output-dir", "mine"])).state == "interrupted"


def test_folders_that_are_no_runs(in_tmp):
    (in_tmp / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        decide_run(parse_config(["--output-dir", "file"]))
    (in_tmp / "full").mkdir()
    (in_tmp / "full" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds files but is not a run"):
        decide_run(parse_config(["--output-dir", "full"]))
    (in_tmp / "failed").mkdir()
    for name in ("train.log", "training_config.json.draft"):
        (in_tmp / "failed" / name).write_text("a start that failed")
    assert decide_run(parse_config(["--output-dir", "failed"])).state == "new"


def test_an_incomplete_last_line_of_metrics_is_skipped(in_tmp):
    append_metrics(in_tmp, {"step": 1})
    with open(in_tmp / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(in_tmp) == [{"step": 1}]
    append_metrics(in_tmp, {"step": 2})  # is not appended to the incomplete line
    assert read_metrics(in_tmp) == [{"step": 1}, {"step": 2}]
    with open(in_tmp / "metrics.jsonl", "ab") as file:
        file.write(b"\0" * 9 + b"\xff\n5\n")  # a crash of the machine
    append_metrics(in_tmp, {"step": 3, "completed": True})
    truncate_metrics(in_tmp, in_tmp, 2)
    assert (in_tmp / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    ("before", "after", "resumes"),
    [
        (["--max-steps", "700"], ["--max-steps", "1"], False),
        (["--max-steps", "700"], ["--max-steps", "900"], True),
        (["--num-train-epochs", "3"], ["--num-train-epochs", "2"], False),
        (["--num-train-epochs", "3"], ["--num-train-epochs", "5"], True),
        (["--num-train-epochs", "3"], ["--max-steps", "900"], False),
    ],
)
def test_a_shorter_run_does_not_take_over_a_longer_one(before, after, resumes):
    start([*before, "--output-dir", "runs/default"])
    chosen = decide_run(parse_config(after))
    assert str(chosen.folder) == ("runs/default" if resumes else "runs/default-2")


def test_a_run_folder_that_is_a_file_is_passed_over():
    Path("runs").mkdir()
    Path("runs/default").write_text("x")
    assert str(decide_run(parse_config([])).folder) == "runs/default-2"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"class_names": ["a", "b", "c"]}, "the class names changed since the run started"),
        (
            {"data_fingerprint": "other", "precision": "fp16"},
            r"the images of train and val and the precision \(bf16 -> fp16\) cha",
        ),
        ({"model_files": "f00"}, "the model's files changed since the run started"),
        (
            {"stream_workers": 2},
            r"the number of loader workers, which orders a streamed data set, \(None -> 2\) changed since the run",
        ),
        ({"ranks": 4}, r"the number of ranks \(1 -> 4\) changed since the run started; restore .*--allow-changed"),
        ({"tokenizer_probe": [9]}, "the tokenizer changed"),
        ({"model_commit": "abc"}, r"the model's commit \(None -> abc\) changed"),
    ],
)
def test_data_or_model_that_changed_stop_a_resume(changed, words):
    facts = {
        "class_names": ["a", "b"],
        "data_fingerprint": "x",
        "tokenizer_probe": [1],
        "model_commit": None,
        "precision": "bf16",
        "ranks": 1,
        "model_files": None,
        "stream_workers": None,
    }
    Path("mine").mkdir()
    save_config(parse_config([]), "mine", facts)
    check_same_facts(facts, "mine")
    with pytest.raises(ConfigError, match=words):
        check_same_facts(facts | changed, "mine")
    (note,) = check_same_facts(facts | changed, "mine", allow_changed=True)
    assert note.startswith("changed since the run started, as --allow-changed says: the ")


# ---- --resume


def checkpoint_of(run: str, step: int) -> str:
    folder = Path(run) / f"checkpoint-{step}"
    folder.mkdir()
    return str(folder)


def test_never_begins_a_new_run():
    start(["--preset", "tiny"])
    chosen = decide_run(parse_config(["--preset", "tiny", "--resume", "never"]))
    assert (chosen.state, str(chosen.folder)) == ("new", "runs/tiny-2")
    assert chosen.notes == ["runs/tiny is kept (--resume never)", "using runs/tiny-2"]
    with pytest.raises(ConfigError, match="holds a run, and --resume never starts a new one; give a new folder"):
        decide_run(parse_config(["--preset", "tiny", "--resume", "never", "--output-dir", "runs/tiny"]))


@pytest.mark.parametrize("start_from", ["mine", "mine/checkpoint-50"])
def test_a_given_run_or_its_newest_checkpoint_resumes_in_its_folder(start_from):
    start(["--output-dir", "mine"])
    for step in (9, 50):
        checkpoint_of("mine", step)
    chosen = decide_run(parse_config(["--resume", start_from]))
    assert (chosen.state, str(chosen.folder), chosen.recorded.get("origin")) == ("interrupted", "mine", None)
    with pytest.raises(ConfigError, match="another config .seed: 42 -> 7"):
        decide_run(parse_config(["--resume", start_from, "--seed", "7"]))
    with pytest.raises(ConfigError, match=r"or --allow-changed .not for model, trainable, lora_r, optim."):
        decide_run(parse_config(["--resume", start_from, "--lora-r", "8", "--allow-changed"]))
    changed = decide_run(parse_config(["--resume", start_from, "--seed", "7", "--allow-changed"]))
    assert changed.state == "interrupted" and changed.notes[0] == "changed, as --allow-changed says: seed: 42 -> 7"


def test_a_checkpoint_forks_a_run_and_the_same_command_resumes_the_fork():
    start(["--output-dir", "mine"])
    start_from = checkpoint_of("mine", 50)
    checkpoint_of("mine", 100)
    flags = ["--resume", start_from, "--output-dir", "other"]
    chosen = decide_run(parse_config(flags))
    assert (chosen.state, str(chosen.folder)) == ("new", "other")
    assert chosen.recorded["origin"] == str(Path(start_from).resolve())
    assert save(parse_config(flags)) == "other"
    Path(start_from).rmdir()  # rotated by the old run, which continues
    again = decide_run(parse_config(flags))
    assert (again.state, str(again.folder)) == ("interrupted", "other")
    with pytest.raises(ConfigError, match="holds what did not start from mine/checkpoint-100; give a new folder"):
        decide_run(parse_config(["--resume", "mine/checkpoint-100", "--output-dir", "other"]))


def test_the_same_command_resumes_a_run_that_is_past_the_given_checkpoint():
    start(["--output-dir", "mine"])
    command = parse_config(["--resume", checkpoint_of("mine", 50)])
    assert save(command) == "mine"
    checkpoint_of("mine", 100)
    assert decide_run(command).state == "interrupted"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--resume", "nowhere"],
            "--resume nowhere: is no run and no checkpoint of one; use auto, never, or a path like",
        ),
        (["--resume", "mine/file"], "--resume mine/file: is no run and no checkpoint of one"),
        (["--resume", "mine/checkpoint-7"], "is no run and no checkpoint of one; mine has checkpoint-50, checkpoint-9"),
        (
            ["--resume", "mine/checkpoint-9", "--output-dir", "mine/file"],
            "--output-dir mine/file: is a file; give a fo",
        ),
        (["--resume", "mine", "--preset", "projector"], "another config .*; it was started with --preset default"),
        (
            ["--resume", "mine/checkpoint-9"],
            "the run continued to step 50 from there; leave --resume out to resume it, or",
        ),
        (["--resume", "mine", "--output-dir", "new"], "a run resumes in its own folder; give one of its checkpoints"),
        (["--resume", "mine/checkpoint-9", "--output-dir", "new", "--seed", "7"], "another config .seed: 42 -> 7"),
    ],
)
def test_starts_that_cannot_be(flags, words):
    start(["--output-dir", "mine"])
    Path("mine/file").write_text("")
    for step in (9, 50):
        checkpoint_of("mine", step)
    with pytest.raises(ConfigError, match=words):
        decide_run(parse_config(flags))
    assert sorted(path.name for path in Path(".").iterdir()) == ["mine"]


@pytest.mark.parametrize("value", ["fast", -1, None, True])
def test_a_saved_config_with_values_that_cannot_be(value):
    folder = start(["--output-dir", "mine"])
    path = Path(folder) / "training_config.json"
    saved = json.loads(path.read_text())
    saved["config"]["learning_rate"] = value
    path.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r"training_config.json: cannot be .*\(learning_rate=.*; restore the file"):
        decide_run(parse_config(["--output-dir", "mine"]))


@pytest.mark.parametrize(("started", "kept"), [(False, False), (True, True)])
def test_a_start_that_fails_leaves_no_folder(started, kept):
    """Before its first step; after it the run is there to be resumed."""
    with pytest.raises(RuntimeError), open_run(parse_config(["--preset", "tiny"]), Distributed()) as run:
        save_config(run.config, run.folder, {})
        if started:
            append_metrics(run.folder, {"step": 1})
        raise RuntimeError("no images")
    assert Path("runs/tiny").exists() == kept


def test_a_hub_data_set_is_read_again_at_the_commit_the_run_began_with():
    config = parse_config(["--dataset", "someone/plants"])
    run = Run(config, {"data_commit": ["someone/plants", config.dataset_revision, "abc"]})
    assert run.data_config.dataset_revision == "abc" and run.config == config
    for flags in (["--dataset", "someone/plants", "--dataset-revision", "main"], ["--dataset", "another/set"]):
        other = parse_config(flags)
        assert Run(other, run.recorded).data_config == other
    assert Run(config, {}).data_config == config

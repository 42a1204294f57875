"""Manifests, rotation, forks and room on the disk."""

import json
import os
from types import SimpleNamespace

import pytest

from runtime import atomic, checkpoint
from runtime.atomic import replace_dir
from runtime.checkpoint import (
    MANIFEST,
    check_disk,
    create_checkpoint_dir,
    describe_best,
    fork_checkpoint,
    last_checkpoint,
    read_best,
    recover_interrupted_replace,
    require_valid_checkpoint,
    rotate,
    verify_checkpoint,
    write_manifest,
)
from runtime.run_files import append_metrics, read_metrics
from utils.logging_utils import UserError, setup_logging


@pytest.fixture
def folder(tmp_path):
    """A folder with files and their manifest."""
    made = tmp_path / "checkpoint-10"
    create_checkpoint_dir(made, "mine")
    (made / "sub").mkdir()
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (made / "sub" / "optimizer.pt").write_bytes(b"moments")
    write_manifest(made)
    return made


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    contents = bytearray(path.read_bytes())
    contents[5000] ^= 1
    path.write_bytes(contents)


def zero(folder):
    (folder / "model.safetensors").write_bytes(bytes(10240))


def remove(folder):
    (folder / "sub" / "optimizer.pt").unlink()


def no_manifest(folder):
    (folder / MANIFEST).unlink()


def torn_manifest(folder):
    path = folder / MANIFEST
    path.write_text(path.read_text()[:-20])


def link_out(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/hostname")


def path_out(folder):
    entries = json.loads((folder / MANIFEST).read_text())
    entries["../checkpoint-5/x"] = {"bytes": 0, "sha256": ""}
    (folder / MANIFEST).write_text(json.dumps(entries))


def not_a_mapping(folder):
    (folder / MANIFEST).write_text("[1, 2]")


def loop_for_manifest(folder):
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to(MANIFEST)


def pipe_for_run_id(folder):
    (folder / "run_id").unlink()
    os.mkfifo(folder / "run_id")


def device_for_run_id(folder):
    (folder / "run_id").unlink()
    (folder / "run_id").symlink_to("/dev/zero")


def one_pipe_more(folder):
    os.mkfifo(folder / "sub" / "pipe")


CORRUPTIONS = [truncate, flip_a_bit, zero, remove, no_manifest, torn_manifest, link_out, path_out, not_a_mapping]
CORRUPTIONS += [loop_for_manifest, pipe_for_run_id, device_for_run_id, one_pipe_more]


def test_a_new_checkpoint_is_valid(folder):
    assert verify_checkpoint(folder) is None and not (folder / f"{MANIFEST}.draft").exists()


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_corruption_is_found_and_the_checkpoint_before_is_resumed(corrupt, folder, tmp_path, capsys):
    setup_logging()
    older = make(tmp_path, 9, "mine")
    assert last_checkpoint(tmp_path, "mine") == folder
    corrupt(folder)
    assert verify_checkpoint(folder)
    assert last_checkpoint(tmp_path, "mine") == older
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-9", "corrupted-checkpoint-10"]
    assert "renamed to corrupted-checkpoint-10" in capsys.readouterr().out


def test_corrupted_checkpoints_never_overwrite_each_other(folder, tmp_path):
    for _ in range(3):
        make(tmp_path, 10, "mine", finished=False)
        no_manifest(folder) if (folder / MANIFEST).exists() else None
        assert last_checkpoint(tmp_path, "mine") is None
    assert sorted(os.listdir(tmp_path)) == [f"corrupted-checkpoint-10{end}" for end in ("", "-2", "-3")]


def test_the_newest_is_by_number_and_other_folders_are_left_alone(folder, tmp_path):
    for name in ("checkpoint-9", "checkpoint-last", "best"):
        create_checkpoint_dir(tmp_path / name, "mine")
        write_manifest(tmp_path / name)
    assert last_checkpoint(tmp_path, "mine") == folder
    assert last_checkpoint(tmp_path / "nowhere", "mine") is None


TRAINABLE = 726_816  # parameters of the tiny model


def test_a_full_disk_is_an_error_before_the_run(tmp_path, monkeypatch):
    check_disk(tmp_path, TRAINABLE, 2)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e6))
    with pytest.raises(UserError, match="its disk has 0.0 GB free, the checkpoints need 0.2 GB; free space"):
        check_disk(tmp_path, TRAINABLE, 2)


def test_a_resumed_run_needs_space_only_for_what_is_not_written_yet(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=212e6))
    with pytest.raises(UserError, match="the checkpoints need 0.3 GB"):
        check_disk(tmp_path, TRAINABLE, 4)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "x").write_bytes(bytes(45_000_000))
    check_disk(tmp_path, TRAINABLE, 4)


def test_best_is_replaced_whole_or_not_at_all(tmp_path):
    best = tmp_path / "best"

    def fill(text: str, fault: bool = False):
        with replace_dir(best) as draft:
            (draft / "best.json").write_text(text)
            write_manifest(draft)
            if fault:
                raise OSError("killed")

    fill('{"step": 1}')
    with pytest.raises(OSError, match="killed"):
        fill('{"step": 2}', fault=True)
    assert read_best(best) == {"step": 1}
    fill('{"step": 3}')
    assert read_best(best) == {"step": 3} and describe_best(best).startswith("step 3, manifest ")
    assert os.listdir(tmp_path) == ["best"]
    (best / "best.json").write_text('{"step": 4}')
    assert read_best(best) is None
    with pytest.raises(UserError, match="best.json differs from its manifest"):
        describe_best(best)


@pytest.mark.parametrize("moment", ["before the first rename", "between the two", "after both"])
def test_a_kill_while_best_is_replaced_leaves_the_old_or_the_new_one(moment, tmp_path):
    best, draft, old = tmp_path / "best", tmp_path / "best.draft", tmp_path / "best.old"
    for folder, step in ((best, 1), (draft, 2)):
        folder.mkdir()
        (folder / "best.json").write_text(json.dumps({"step": step}))
        write_manifest(folder)
    if moment != "before the first rename":
        best.rename(old)
    if moment == "after both":
        draft.rename(best)
    recover_interrupted_replace(best)
    assert read_best(best)["step"] == (1 if moment == "before the first rename" else 2)
    with replace_dir(best) as folder:
        (folder / "best.json").write_text('{"step": 3}')
        write_manifest(folder)
    assert read_best(best)["step"] == 3 and os.listdir(tmp_path) == ["best"]


def test_a_kill_between_the_renames_with_a_torn_draft_brings_the_old_one_back(tmp_path):
    for name in ("best.draft", "best.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "best.old" / "best.json").write_text('{"step": 1}')
    write_manifest(tmp_path / "best.old")
    recover_interrupted_replace(tmp_path / "best")
    assert read_best(tmp_path / "best") == {"step": 1}


# ---- the run that wrote it


def make(run, step, run_id, finished=True):
    folder = run / f"checkpoint-{step}"
    create_checkpoint_dir(folder, run_id)
    (folder / "x").write_text("x")
    if finished:
        write_manifest(folder)
    return folder


def test_rotation_keeps_the_newest_completed_checkpoints_and_those_of_other_runs(tmp_path):
    for step in (10, 20, 30, 40):
        make(tmp_path, step, "mine", finished=step != 20)
    make(tmp_path, 5, "other")
    (tmp_path / "checkpoint-7").mkdir()
    make(tmp_path, 8, "mine").rename(tmp_path / "checkpoint-8.deleted")  # of an earlier version, killed there
    make(tmp_path, 9, "other").rename(tmp_path / "checkpoint-9.deleted")
    rotate(tmp_path, "mine", 2)
    left = [f"checkpoint-{rest}" for rest in ("30", "40", "5", "7", "9.deleted")]
    assert sorted(os.listdir(tmp_path)) == left


@pytest.mark.parametrize("again", [False, True])
def test_a_kill_while_a_checkpoint_is_deleted_leaves_nothing_that_stays(again, tmp_path, monkeypatch):
    """Also where its run_id and manifest went first, and where the run comes to that step again."""

    def killed(path):
        for name in ("run_id", MANIFEST):
            (path / name).unlink()
        raise KeyboardInterrupt

    for step in (10, 20, 30):
        make(tmp_path, step, "mine")
    with monkeypatch.context() as fault, pytest.raises(KeyboardInterrupt):
        fault.setattr(checkpoint.shutil, "rmtree", lambda path, **_: killed(path) if path.exists() else None)
        rotate(tmp_path, "mine", 2)
    assert len(os.listdir(tmp_path)) == 3 and not (tmp_path / "checkpoint-10").exists()
    if again:
        make(tmp_path, 10, "mine")
    rotate(tmp_path, "other", 2)
    assert len(os.listdir(tmp_path)) == 3 + again
    rotate(tmp_path, "mine", 2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-20", "checkpoint-30"]


def test_the_id_of_a_checkpoint_is_on_disk_before_anything_else(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic, "sync", lambda path: synced.append(path.read_text() if path.is_file() else ""))
    create_checkpoint_dir(tmp_path / "checkpoint-1", "mine")
    assert "mine" in synced


def test_rotation_never_leaves_fewer_completed_checkpoints_than_it_keeps(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, step, "mine", finished=step != 30)
    rotate(tmp_path, "mine", 2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]


@pytest.mark.parametrize("finished", [True, False])
def test_checkpoints_of_another_run_are_neither_resumed_nor_renamed_nor_written_to(finished, tmp_path):
    make(tmp_path, 5, "other")
    mine = make(tmp_path, 10, "mine")
    assert last_checkpoint(tmp_path, "mine") == mine
    make(tmp_path, 90, "other", finished)
    for look in (
        lambda: last_checkpoint(tmp_path, "mine"),
        lambda: create_checkpoint_dir(tmp_path / "checkpoint-90", "mine"),
    ):
        with pytest.raises(
            UserError, match="checkpoint-90: written by another run; move it, then re-run the same command"
        ):
            look()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-5", "checkpoint-90"]


@pytest.mark.parametrize("corrupt", [lambda file: file.unlink(), lambda file: file.write_text("min")])
def test_a_checkpoint_whose_run_id_is_corrupted_is_still_of_its_run(corrupt, tmp_path):
    corrupt(make(tmp_path, 20, "mine") / "run_id")
    assert last_checkpoint(tmp_path, "mine") is None and os.listdir(tmp_path) == ["corrupted-checkpoint-20"]


@pytest.mark.parametrize(("best_step", "taken"), [(10, True), (30, False)])
def test_a_forked_run_has_the_metrics_and_best_of_its_checkpoint(best_step, taken, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    checkpoint = make(old, 20, "old")
    for step in (10, 20, 30):
        append_metrics(old, {"step": step})
    with replace_dir(old / "best") as folder:
        (folder / "best.json").write_text(json.dumps({"step": best_step}))
        write_manifest(folder)
    copy = fork_checkpoint(checkpoint, new, "new")
    assert last_checkpoint(new, "new") == copy and last_checkpoint(old, "old") == checkpoint
    assert [line["step"] for line in read_metrics(new)] == [10, 20] and (new / "best").exists() == taken
    assert len(read_metrics(old)) == 3 and read_best(old / "best")["step"] == best_step
    (checkpoint / "x").write_text("y")
    with pytest.raises(UserError, match="checkpoint-20: x differs from its manifest; use another checkpoint of"):
        require_valid_checkpoint(checkpoint)

import json
import os
from types import SimpleNamespace

import pytest

from models import checkpoint
from models.checkpoint import (
    MANIFEST,
    check_disk,
    describe_best,
    find_damage,
    last_checkpoint,
    read_best,
    replacing,
    write_manifest,
)
from utils.logging_utils import UserError, setup_logging


@pytest.fixture
def folder(tmp_path):
    """A folder with files and their manifest."""
    made = tmp_path / "checkpoint-10"
    (made / "sub").mkdir(parents=True)
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


DAMAGES = [truncate, flip_a_bit, zero, remove, no_manifest, torn_manifest, link_out, path_out, not_a_mapping]


def test_an_untouched_folder_holds(folder):
    assert find_damage(folder) is None and not (folder / f"{MANIFEST}.draft").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_one_before_is_resumed(damage, folder, tmp_path, capsys):
    setup_logging()
    older = tmp_path / "checkpoint-9"
    older.mkdir()
    (older / "x").write_text("fine")
    write_manifest(older)
    assert last_checkpoint(tmp_path) == folder
    damage(folder)
    assert find_damage(folder)
    assert last_checkpoint(tmp_path) == older
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-9", "damaged-checkpoint-10"]
    assert "renamed to damaged-checkpoint-10" in capsys.readouterr().out


def test_damaged_ones_never_overwrite_each_other(folder, tmp_path):
    for _ in range(3):
        folder.mkdir(exist_ok=True)
        no_manifest(folder) if (folder / MANIFEST).exists() else None
        assert last_checkpoint(tmp_path) is None
    assert sorted(os.listdir(tmp_path)) == [f"damaged-checkpoint-10{end}" for end in ("", "-2", "-3")]


def test_newest_is_by_number_and_other_folders_are_left_alone(folder, tmp_path):
    for name in ("checkpoint-9", "checkpoint-last", "best"):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name)
    assert last_checkpoint(tmp_path) == folder
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_disk_without_room_is_told_before_the_run(tmp_path, monkeypatch, tiny):
    check_disk(tmp_path, tiny.model(), 2)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e6))
    with pytest.raises(UserError, match="0.0 GB free on its disk, the checkpoints need 0.2 GB; make room"):
        check_disk(tmp_path, tiny.model(), 2)


def test_best_is_replaced_whole_or_not_at_all(tmp_path):
    best = tmp_path / "best"

    def fill(text: str, fault: bool = False):
        with replacing(best) as draft:
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

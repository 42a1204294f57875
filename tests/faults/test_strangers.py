"""Run folders and checkpoints that a stranger made: nothing in them runs, and what cannot be used is told."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import train
from models import callbacks
from runtime.checkpoint import write_manifest

RUN = ["--preset", "tiny", "--max-steps", "4", "--save-steps", "2", "--num-workers", "0", "--output-dir", "run"]


class Bomb:
    """Whoever unpickles it makes a file."""

    def __reduce__(self):
        return open, ("planted", "w")


def test_the_bomb_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb())).close()
    assert Path("planted").exists()


@pytest.fixture
def here(tmp_path, monkeypatch, small_splits):
    """A working folder with run/, which was left after step 3 with a checkpoint of step 2."""
    monkeypatch.chdir(tmp_path)
    real = callbacks.RunLog.on_step_end

    def stop(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as fault:
        fault.setattr(callbacks.RunLog, "on_step_end", stop)
        with pytest.raises(SystemExit):
            train.main(RUN)
    return tmp_path


def call(main, argv, capsys) -> tuple[int, str]:
    capsys.readouterr()
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().out


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_bomb_in_a_checkpoint_does_not_run(name, here, capsys):
    checkpoint = here / "run" / "checkpoint-2"
    torch.save({"state": Bomb()}, checkpoint / name)
    write_manifest(checkpoint)
    status, told = call(train.main, RUN, capsys)
    assert status == 1 and "checkpoint-2: holds a file that is more than numbers (" in told and "Traceback" not in told
    assert not (here / "planted").exists()


def test_bombs_beside_the_weights_are_not_read(here, capsys):
    for folder in (here / "run" / "checkpoint-2", here / "run"):
        for name in ("training_args.bin", "pytorch_model.bin", "adapter_model.bin"):
            torch.save(Bomb(), folder / name)
    write_manifest(here / "run" / "checkpoint-2")
    assert call(train.main, RUN, capsys)[0] == 0
    best = here / "run" / "best"
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "processor.pkl"):
        torch.save(Bomb(), best / name)
    write_manifest(best)
    assert call(evaluate.main, ["run", "--num-workers", "0"], capsys)[0] == 0
    (best / "model.safetensors").unlink()
    write_manifest(best)
    status, told = call(evaluate.main, ["run", "--num-workers", "0"], capsys)
    assert status == 1 and "run/best: its weights cannot be loaded" in told and "Traceback" not in told
    assert not (here / "planted").exists()


CODE = "open('planted', 'w').close()\nfrom transformers import LlavaNextConfig as Config\n"


@pytest.mark.parametrize("kind", ["llava_next", "strange"])
def test_code_that_comes_with_a_model_does_not_run(kind, checkpoint, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(checkpoint(), tmp_path / "model"))
    (model / "code.py").write_text(CODE)
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        settings = json.loads((model / name).read_text())
        settings["auto_map"] = {f"Auto{part}": "code.Config" for part in ("Config", "Processor", "Model", "Tokenizer")}
        (model / name).write_text(json.dumps(settings | ({"model_type": kind} if name == "config.json" else {})))
    flags = ["--model", "./model", "--dataset", str(image_folder({"oak": 6, "ash": 6})), "--image-size", "70"]
    status, told = call(train.main, [*flags, "--max-steps", "1", "--num-workers", "0"], capsys)
    assert (status == 0) == (kind == "llava_next") and "Traceback" not in told
    assert status == 0 or "/model: its config cannot be loaded" in told
    assert not (tmp_path / "planted").exists()

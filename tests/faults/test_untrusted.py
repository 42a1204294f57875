"""Runs, checkpoints and models from an untrusted source: none of their code is executed, and errors say why."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import train
from data import dataset
from models import callbacks
from runtime.checkpoint import write_manifest
from tests.conftest import run_printed

RUN = ["--preset", "tiny", "--max-steps", "4", "--save-steps", "2", "--num-workers", "0", "--output-dir", "run"]


class Payload:
    """Unpickling it creates a file."""

    def __reduce__(self):
        return open, ("planted", "w")


def test_the_payload_works(here):
    pickle.loads(pickle.dumps(Payload())).close()
    assert Path("planted").exists()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that stopped after step 3 with a checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    on_step_end = callbacks.RunLog.on_step_end

    def stop(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks.RunLog, "on_step_end", stop)
        for split, size in {"train": 48, "validation": 20, "test": 20}.items():
            patch.setitem(dataset.SPLIT_SIZES, split, size)
        with pytest.raises(SystemExit):
            train.main([*RUN[:-1], str(folder)])
    return folder


@pytest.fixture
def run(interrupted, here, small_splits):
    """run/ in the working folder, as it was interrupted."""
    shutil.copytree(interrupted, here / "run")
    config = here / "run" / "training_config.json"
    config.write_text(config.read_text().replace(json.dumps(str(interrupted)), '"run"'))
    return here / "run"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_not_executed(name, run, capsys):
    checkpoint = run / "checkpoint-2"
    torch.save({"state": Payload()}, checkpoint / name)
    write_manifest(checkpoint)
    status, output = run_printed(train.main, capsys, *RUN)
    assert status == 1 and "checkpoint-2: a file in it holds more than numbers (" in output and "\x1b" not in output
    assert "Traceback" not in output and not Path("planted").exists()


def test_pickles_beside_the_weights_are_not_read(run, capsys):
    for folder in (run / "checkpoint-2", run):
        for name in ("training_args.bin", "pytorch_model.bin", "adapter_model.bin"):
            torch.save(Payload(), folder / name)
    write_manifest(run / "checkpoint-2")
    assert run_printed(train.main, capsys, *RUN)[0] == 0
    best = run / "best"
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "processor.pkl"):
        torch.save(Payload(), best / name)
    write_manifest(best)
    assert run_printed(evaluate.main, capsys, "run", "--num-workers", "0")[0] == 0
    (best / "model.safetensors").unlink()
    write_manifest(best)
    status, output = run_printed(evaluate.main, capsys, "run", "--num-workers", "0")
    assert status == 1 and "run/best: holds no model.safetensors and no" in output and "Traceback" not in output
    assert not Path("planted").exists()


CODE = "open('planted', 'w').close()\nfrom transformers import LlavaNextConfig as Config\n"


@pytest.mark.parametrize("kind", ["llava_next", "unknown"])
def test_code_that_comes_with_a_model_is_not_executed(kind, checkpoint, image_folder, here, capsys):
    model = Path(shutil.copytree(checkpoint(), here / "model"))
    (model / "code.py").write_text(CODE)
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        settings = json.loads((model / name).read_text())
        settings["auto_map"] = {f"Auto{part}": "code.Config" for part in ("Config", "Processor", "Model", "Tokenizer")}
        (model / name).write_text(json.dumps(settings | ({"model_type": kind} if name == "config.json" else {})))
    flags = ["--model", "./model", "--dataset", str(image_folder({"oak": 6, "ash": 6})), "--image-size", "70"]
    status, output = run_printed(train.main, capsys, *flags, "--max-steps", "1", "--num-workers", "0")
    assert (status == 0) == (kind == "llava_next") and "Traceback" not in output
    assert status == 0 or "/model: its config cannot be loaded" in output
    assert not Path("planted").exists()

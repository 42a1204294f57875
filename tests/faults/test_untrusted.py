"""Runs, checkpoints and models from an untrusted source: none of their code is executed, and errors say why."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import export
import train
from models.merging import read_adapter
from models.trainable import lora_settings
from runtime.checkpoint import write_manifest
from tests.conftest import run_printed, use_small_splits
from tests.integration.test_train import kill_at
from utils.logging_utils import UserError

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
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 3)
        use_small_splits(patch)
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


# ---- files of a run that were planted or edited


def edit(path: Path, **changes) -> None:
    """Of a JSON file in a folder whose manifest then fits."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    write_manifest(path.parent)


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"r": 8},
        {"lora_alpha": 64},
        {"use_rslora": True},
        {"alpha_pattern": {".*": 64}},
        {"target_modules": ["q_proj"]},
        {"auto_mapping": {"base_model_class": "Model", "parent_library": "planted"}},
        {"megatron_core": "planted"},
    ],
)
def test_an_adapter_config_that_is_not_the_runs_is_refused(changes, trained_lora, here, monkeypatch, capsys):
    Path("planted.py").write_text("open('planted', 'w').close()")
    monkeypatch.syspath_prepend(here)
    edit(trained_lora / "best" / "adapter_config.json", **changes)
    status, output = run_printed(evaluate.main, capsys, "two", "--num-workers", "0")
    assert status == 1 and "error: two/best: its adapter_config.json is not that of the run's adapter (" in output
    assert next(iter(changes)) in output and "Traceback" not in output and not Path("planted").exists()
    (trained_lora / "best" / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="it is nested too deep.; put the run's own files back, or train again"):
        read_adapter(trained_lora / "best", lora_settings("adapter+projector", 4, 32, 0.0))


def test_an_adapter_of_another_rank_is_not_merged(trained_lora):
    config = trained_lora / "best" / "adapter_config.json"
    assert read_adapter(config.parent, lora_settings("adapter+projector", 4, 32, 0.0)).scale == 8
    edit(config, r=8)
    with pytest.raises(UserError, match="holds weights that are of no LoRA adapter of rank 8; export a run"):
        read_adapter(config.parent, lora_settings("adapter+projector", 8, 32, 0.0))


def test_of_a_full_fine_tune_only_the_tensors_are_read(trained, capsys):
    """Neither another attention, nor another model type, nor an adapter with a base on the hub."""
    best = trained / "best"
    names = {"attn_implementation": "owner/kernel", "_attn_implementation": "owner/kernel"}
    edit(best / "config.json", model_type="mistral", auto_map={"AutoConfig": "code.Config"}, **names)
    (best / "code.py").write_text("open('planted', 'w').close()")
    (best / "custom_generate").mkdir()
    (best / "custom_generate" / "generate.py").write_text("open('planted', 'w').close()")
    (best / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base", "peft_type": "LORA"}')
    write_manifest(best)
    before = json.loads((trained / "eval_val.json").read_text())
    assert (
        run_printed(evaluate.main, capsys, "one", "--num-workers", "0", "--protocol", "both")[0] == 0
        and not Path("planted").exists()
    )
    after = json.loads((trained / "eval_val.json").read_text())
    assert after["ece"] == pytest.approx(before["ece"], abs=1e-3) and after["top1"] == before["top1"]
    assert run_printed(export.main, capsys, "one", "out")[0] == 0 and not Path("planted").exists()
    assert not {"auto_map", "attn_implementation"} & json.loads(Path("out/config.json").read_text()).keys()


def test_weights_that_are_a_link_are_refused(trained, here, capsys):
    weights = trained / "best" / "model.safetensors"
    weights.rename(here / "elsewhere")
    weights.symlink_to(here / "elsewhere")
    status, output = run_printed(evaluate.main, capsys, "one", "--num-workers", "0")
    assert status == 1 and "one/best: holds no complete weights (model.safetensors is a link)" in output


@pytest.mark.parametrize(
    "changes",
    [{"more": 1}, {"global_step": 3}, {"log_history": [None]}, {"total_flos": "x"}, {"stateful_callbacks": []}],
)
def test_a_state_that_transformers_cannot_use(changes, run, capsys):
    edit(run / "checkpoint-2" / "trainer_state.json", **changes)
    status, output = run_printed(train.main, capsys, *RUN)
    assert "Traceback" not in output
    if status:  # what only transformers can tell
        assert "checkpoint-2: its trainer_state.json cannot be used (" in output and "delete the folder" in output
    else:
        assert "trainer_state.json is corrupted: " in output and "no checkpoint to resume from" in output

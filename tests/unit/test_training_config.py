import json
import subprocess
import sys
import time

import pytest

from config.training_config import (
    CONFIG_FILE,
    PRESETS,
    ConfigError,
    TrainingConfig,
    find_problems,
    load_config,
    parse_config,
    save_config,
)
from tests.conftest import ROOT


def problems_of(argv, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_config(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_the_documented_ones():
    config = TrainingConfig()
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (1, 16)
    assert (config.learning_rate, config.max_grad_norm, config.logging_steps, config.image_size) == (1e-5, 0.5, 10, 336)
    assert (config.gradient_checkpointing, config.mixed_precision, config.compile) == ("auto",) * 3
    assert config.auto_batch and config.load_in_4bit
    assert (config.gpu_memory_fraction, config.lora_r, config.lora_dropout) == (0.9, 16, 0.0)
    assert config.effective_batch_size == 16


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_free_of_problems(preset):
    assert parse_config(["--preset", preset]).preset == preset


def test_published_preset_is_the_setting_of_the_paper():
    config = parse_config(["--preset", "published"])
    assert (config.lora_r, config.lora_alpha, config.learning_rate, config.projector_learning_rate) == (
        128,
        256,
        2e-4,
        2e-5,
    )
    assert (config.num_train_epochs, config.train_on_val, config.effective_batch_size) == (50, True, 64)
    assert config.question == "What type of object is in this photo?"


def test_flags_override_the_preset_in_either_spelling():
    config = parse_config(
        ["--preset=tiny", "--max_steps", "9", "--learning-rate=2e-4", "--image-size", "none", "--pin-memory"]
    )
    assert (config.max_steps, config.learning_rate, config.image_size, config.pin_memory) == (9, 2e-4, None, True)
    assert parse_config(["--load-in-4bit", "false"]).load_in_4bit is False


BAD_FLAGS = [
    (["--compile", "true", "--lora-dropout", "0.1"], "compile=true: has no effect with lora_dropout above 0 or"),
    (["--gradient-checkpointing", "offload", "--trainable", "everything"], "gradient_checkpointing=offload: has no"),
    (["--learning-rat", "1"], "--learning-rat: unknown flag; did you mean --learning-rate?"),
    (["--preset", "tny"], "--preset tny: not one of default, tiny, scratch, native, projector, published; did you"),
    (["runs/x"], "runs/x: stands alone; settings are given as --name value"),
    (["--load-in-4bit", "nope"], "load_in_4bit=nope: true or false is needed"),
    (["--lora-r", "many"], "lora_r=many: a whole number is needed"),
    (["--lora-r", "0"], "lora_r=0: must be at least 1; the default is 16"),
    (["--learning-rate", "0"], "learning_rate=0.0: must be above 0"),
    (["--learning-rate", "nan"], "learning_rate=nan: must be above 0"),
    (["--learning-rate", "inf"], "learning_rate=inf: must be above 0"),
    (["--sample-fraction", "1.5"], "sample_fraction=1.5: must be above 0 and at most 1"),
    (["--seed", "none"], "seed=none: a whole number is needed"),
    (["--mixed-precision", "fp8"], "mixed_precision=fp8: not one of auto, bf16, fp16, no"),
    (["--max-steps", "0"], "max_steps=0: nothing would be trained; use -1"),
    (["--save-total-limit", "1"], "save_total_limit=1: must be at least 2"),
    (["--streaming", "true", "--dataset", "images"], "streaming=true with max_steps=-1: a stream has no end; give a"),
    (["--streaming", "true", "--max-steps", "5"], "dataset=oxford_flowers102: only a folder of parquet files is stre"),
    (
        ["--streaming", "true", "--max-steps", "5", "--dataset", "images", "--sample-fraction", "0.5"],
        "streaming=true with sample_fraction=0.5 and train_on_val=false: both need all images at once; use 1 and",
    ),
    (
        ["--trainable", "everything", "--load-in-4bit", "false", "--sharding", "fsdp"],
        "trainable=everything with sharding=fsdp: frozen weights are spread, and nothing is frozen; use --sharding",
    ),
    (["--trainable", "everything"], "trainable=everything with load_in_4bit=true: 4-bit weights cannot learn"),
    (["--projector-learning-rate", "1e-5"], "trainable=adapter leaves the projector as it is"),
    (["--train-on-val", "true"], "eval_steps=100 with train_on_val=true: images that are learned from measure nothing"),
    (["--question", "What  is it?"], "with spaces at an end or doubled"),
    (["--question", ""], "question='': empty"),
    (["--report-to", "wandb, x"], "report_to='wandb, x': use none, all, or names with commas"),
]  # fmt: skip


def test_folders_are_found_from_anywhere_and_names_are_no_folders(tmp_path, monkeypatch):
    """An export may lie beside the program under the very name of what is built here."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "synthetic", "oxford_flowers102", "mine"):
        (tmp_path / name).mkdir()
    config = parse_config(["--preset", "tiny"])
    assert (config.model, config.dataset) == ("tiny", "synthetic") and parse_config([]).dataset == "oxford_flowers102"
    assert parse_config(["--dataset", "mine"]).dataset == str(tmp_path / "mine")


@pytest.mark.parametrize(("argv", "words"), BAD_FLAGS)
def test_bad_flag_is_told_with_its_value_and_the_next_move(argv, words, capsys):
    assert words in problems_of(argv, capsys)


def test_all_problems_are_told_at_once(capsys):
    told = problems_of(["--lora-r", "0", "--sed", "1", "--max-steps", "x", "--learning-rate", "-1"], capsys)
    assert told.count("error:") == 4 and "did you mean --seed?" in told


def test_a_wrong_value_edited_into_the_file_is_told():
    assert any("lora_r='16': a whole number is needed" in told for told in find_problems(TrainingConfig(lora_r="16")))
    assert any("seed=none: a value is needed" in told for told in find_problems(TrainingConfig(seed=None)))
    assert any("learning_rate=true" in told.lower() for told in find_problems(TrainingConfig(learning_rate=True)))


def test_a_config_saved_before_recomputation_could_be_auto_is_read(tmp_path):
    save_config(TrainingConfig(gradient_checkpointing=True), tmp_path, {})
    assert load_config(tmp_path)[0].gradient_checkpointing == "true"


def test_a_saved_config_comes_back(tmp_path):
    config = parse_config(["--preset", "native", "--seed", "7"])
    save_config(config, tmp_path, {"model_commit": "abc"})
    assert load_config(tmp_path) == (config, {"model_commit": "abc"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "not a run, training_config.json is missing"),
        ("{", "cannot be read as the config of a run"),
        ("[]", "cannot be read as the config of a run"),
        (json.dumps({"config": {"color": 1}, "recorded": {}}), "unexpected keyword argument 'color'"),
    ],
)
def test_a_folder_that_is_no_run_is_told(text, words, tmp_path):
    if text is not None:
        (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path)


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_help_comes_before_anything_heavy(script):
    quickest = 9.0
    for _ in range(5):
        began = time.perf_counter()
        told = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
        quickest = min(quickest, time.perf_counter() - began)
    assert "usage" in told.stdout and quickest < 0.3

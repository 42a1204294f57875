"""TrainingConfig: defaults, validation, saving and loading."""

import json

import pytest

from config.cli import parse_config
from config.training_config import CONFIG_FILE, PRESETS, ConfigError, TrainingConfig, config_from_dict, find_problems
from runtime.run_files import load_config, save_config


def problems_of(**values) -> str:
    return "\n".join(find_problems(TrainingConfig(**values)))


def test_defaults_are_the_documented_ones():
    config = TrainingConfig()
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (1, 16)
    assert (config.learning_rate, config.max_grad_norm, config.logging_steps, config.image_size) == (1e-5, 0.5, 10, 336)
    assert (config.gradient_checkpointing, config.mixed_precision, config.compile) == ("auto",) * 3
    assert config.auto_batch and config.load_in_4bit
    assert (config.gpu_memory_fraction, config.lora_r, config.lora_dropout) == (0.9, 16, 0.0)
    assert config.effective_batch_size == 16


def test_published_preset_is_the_setting_of_the_paper():
    config = TrainingConfig(**PRESETS["published"])
    assert (config.lora_r, config.lora_alpha) == (128, 256)
    assert (config.learning_rate, config.projector_learning_rate) == (2e-4, 2e-5)
    assert (config.num_train_epochs, config.train_on_val, config.effective_batch_size) == (50, True, 64)
    assert config.question == "What type of object is in this photo?"


STREAM = dict(streaming=True, max_steps=5, dataset="images")
BAD_VALUES = [
    (dict(lora_r=0), "lora_r=0: must be at least 1; the default is 16"),
    (dict(learning_rate=0.0), "learning_rate=0.0: must be above 0"),
    (dict(learning_rate=float("nan")), "learning_rate=nan: must be above 0"),
    (dict(learning_rate=float("inf")), "learning_rate=inf: must be above 0"),
    (dict(sample_fraction=1.5), "sample_fraction=1.5: must be above 0 and at most 1"),
    (dict(mixed_precision="fp8"), "mixed_precision=fp8: not one of auto, bf16, fp16, no"),
    (dict(trainable="adaptor"), "; did you mean adapter?"),
    (dict(max_steps=0), "max_steps=0: there is nothing to train; use -1"),
    (dict(save_total_limit=1), "save_total_limit=1: must be at least 2"),
    (dict(compile="true", lora_dropout=0.1), "compile=true: has no effect with lora_dropout above 0 or"),
    (dict(matmul="fp8", lora_dropout=0.1), "matmul=fp8: has no effect with lora_dropout above 0 or"),
    (dict(gradient_checkpointing="offload", trainable="everything"), "gradient_checkpointing=offload: has no effect"),
    (STREAM | dict(max_steps=-1), "streaming=true with max_steps=-1: a stream has no length; set --max-steps"),
    (STREAM | dict(dataset="synthetic"), "dataset=synthetic: only a folder of parquet files is streamed; use false"),
    (
        STREAM | dict(sample_fraction=0.5),
        "streaming=true with sample_fraction=0.5: it needs all images at once; use 1.0, or streaming=false",
    ),
    (STREAM | dict(holdout_classes=10), "streaming=true with holdout_classes=10: it needs all images at once; use 0"),
    (
        dict(trainable="everything", load_in_4bit=False, sharding="fsdp"),
        "trainable=everything with sharding=fsdp: only frozen weights are sharded; use --sharding none",
    ),
    (dict(trainable="everything"), "trainable=everything with load_in_4bit=true: 4-bit weights cannot be trained"),
    (dict(model="tiny"), "model=tiny with load_in_4bit=true: its weights are not loaded; use --preset tiny"),
    (dict(projector_learning_rate=1e-5), "trainable=adapter freezes the projector"),
    (dict(train_on_val=True), "eval_steps=100 with train_on_val=true: images that are trained on measure nothing"),
    (
        dict(early_stopping_patience=3, eval_steps=None),
        "early_stopping_patience=3 with eval_steps=none: nothing is measured during training",
    ),
    (dict(question="What  is it?"), "leading, trailing or double spaces"),
    (dict(question=" What is it?"), "leading, trailing or double spaces"),
    (dict(question=""), "question='': empty"),
    (dict(report_to="wandb, x"), "report_to='wandb, x': use none, all, or names with commas"),
    # as edited into the file:
    (dict(lora_r="16"), "lora_r='16': a whole number is needed"),
    (dict(seed=None), "seed=none: a value is needed"),
    (dict(learning_rate=True), "learning_rate=True: a number is needed"),
]


@pytest.mark.parametrize(("values", "message"), BAD_VALUES)
def test_a_bad_value_is_reported_with_the_next_move(values, message):
    assert message in problems_of(**values)


def test_every_problem_is_reported():
    assert problems_of(lora_r=0, max_steps=0, train_on_val=True, question="").count("\n") == 3


def test_a_saved_config_is_loaded(tmp_path):
    config = parse_config(["--preset", "native", "--seed", "7"])
    save_config(config, tmp_path, {"model_commit": "abc"})
    assert load_config(tmp_path) == (config, {"model_commit": "abc"})


def test_a_config_of_fields_has_the_defaults_elsewhere():
    assert config_from_dict({"seed": 7, "lora_r": 4}) == TrainingConfig(seed=7, lora_r=4)


def test_all_wrong_fields_of_a_saved_config_are_reported():
    with pytest.raises(ConfigError, match=r"^color: no such option; seed=none: .*; lora_r='x': a whole number"):
        config_from_dict({"color": 1, "seed": None, "lora_r": "x"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not a run, training_config.json is missing"),
        ("{", "cannot be read as a run's config"),
        ("[]", "cannot be read as a run's config"),
        (json.dumps({"config": {"color": 1}, "recorded": {}}), "color: no such option"),
        (json.dumps({"config": {"seed": "x"}, "recorded": {}}), "seed='x': a whole number is needed"),
    ],
)
def test_a_folder_without_a_valid_config_is_reported(text, message, tmp_path):
    if text is not None:
        (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path)

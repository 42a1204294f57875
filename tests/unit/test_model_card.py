import dataclasses
import json
import re

import pytest
from huggingface_hub import ModelCard

from config.training_config import TrainingConfig
from evaluation.model_card import build_model_card, read_reports
from runtime.checkpoint import describe_best, write_manifest
from runtime.run_dir import append_metrics
from utils.tokenizer_utils import Prompt

PROMPT = Prompt("[INST] <image>\nWhat? [/INST]", " ", "</s>", 2)
RECORDED = {
    "model_commit": "c0ffee", "precision": "bf16", "device": "NVIDIA H100", "processes": 2,
    "packages": {"torch": "2.13.0"}, "class_names": ["ash", "oak"],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A run with a report of val."""
    run = tmp_path / "plants"
    (run / "best").mkdir(parents=True)
    (run / "best" / "best.json").write_text('{"step": 2}')
    write_manifest(run / "best")
    for step in (1, 2):
        append_metrics(run, {"step": step, "loss": 1.0, "seconds": 30.0, "peak_gib": 5.25})
    return run


def report(folder, split, **changed):
    pair = {"names": ["ash", "oak"], "confused": 3}
    own = {"ash": {"n": 10, "top1": 0.7}, "oak": {"n": 10, "top1": 0.9}}
    found = {
        "adapter": describe_best(folder / "best"),
        "n": 20,
        "top1": 0.8,
        "top1_interval": [0.58, 0.92],
        "top5": 1.0,
    }
    found |= {
        "dataset": "oxford_flowers102",
        "mean_per_class": 0.8,
        "ece": 0.04,
        "coverage": 0.6,
        "selective_accuracy": 1.0,
        "confusions": [pair],
    }
    found |= {"calibration": {"temperature": 1.5, "threshold": None, "target_selective_accuracy": 0.95, "images": 20}}
    found |= {"per_class": own, "ood": {"noise": {"n": 40, "abstention_rate": 0.5}}} | changed
    (folder / f"eval_{split}.json").write_text(json.dumps(found))


def test_a_card_says_what_the_run_found(folder):
    report(folder, "val")
    report(folder, "test", top1=0.75)
    text = build_model_card(TrainingConfig(model="me/base", dataset="oxford_flowers102"), RECORDED, folder, PROMPT)
    card = ModelCard(text)
    assert card.data.base_model == "me/base" and card.data.library_name == "peft"
    assert {(one.dataset_split, one.metric_value) for one in card.data.eval_results} == {("val", 0.8), ("test", 0.75)}
    for words in (
        "Not for deciding whether a plant is edible or poisonous", "`me/base` at commit `c0ffee`", "336 x 336 pixels",
        "| test | 20 | 0.750 (0.580 to 0.920) | 1.000 | 0.800 | 0.040 | 0.600 | 1.000 |", "| ash | oak | 3 |",
        "| ash | 10 | 0.700 |", "/ 1.500; below never reached", "noise 50%", "2 x NVIDIA H100: 1.0 minutes of steps",
        "The weights are those of step 2; 2 steps of 16 images were taken, LoRA rank 16",
        "peak 5.2 GiB", "Nilsback and Zisserman 2008", "its license could not be read", "in its own splits",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize(
    "changed",
    [{"adapter": "step 1, manifest 0"}, {"per_token": True}, {"prior_calibration": True}, {"dataset": "others"}],
)
def test_reports_of_other_weights_or_scores_are_left_out(folder, changed):
    report(folder, "val", **changed)
    text = build_model_card(TrainingConfig(), RECORDED, folder, PROMPT)
    assert "It was not measured." in text and "| val |" not in text


def test_a_report_that_a_kill_tore_is_left_out(folder):
    report(folder, "val")
    (folder / "eval_test.json").write_text('{"split": "te')
    assert list(read_reports(folder, describe_best(folder / "best"), "oxford_flowers102")) == ["val"]


def test_an_adapter_of_a_base_that_is_saved_nowhere_has_no_code(folder):
    text = build_model_card(TrainingConfig(model="tiny", dataset="synthetic"), RECORDED, folder, PROMPT)
    assert "saved nowhere" in text and "```" not in text


def test_a_base_in_a_folder_is_named_and_its_licence_read(folder, tmp_path):
    base = tmp_path / "secret place" / "llava"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# It\n")
    config = TrainingConfig(model=str(base), dataset=str(tmp_path / "secret place" / "my plants"), image_size=None)
    text = build_model_card(dataclasses.replace(config, question="What tree?"), RECORDED, folder, PROMPT)
    assert "apache-2.0, as its card states" in text and ModelCard(text).data.license == "apache-2.0"
    assert "secret place" not in text and "`my plants`" in text and "at their own size" in text


@pytest.mark.parametrize("size", [336, None])
def test_its_code_is_python(folder, size):
    config = TrainingConfig(image_size=size, trainable="everything", load_in_4bit=False)
    (code,) = re.findall(r"```python\n(.*?)```", build_model_card(config, RECORDED, folder, PROMPT), re.DOTALL)
    compile(code, "card", "exec")
    assert (".resize((336, 336), Image.Resampling.BICUBIC)" in code) == (size == 336) and "peft" not in code

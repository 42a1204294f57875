"""The model card: its facts, its code, and text of users in it."""

import dataclasses
import json
import re

import pytest
from huggingface_hub import ModelCard

from config.training_config import TrainingConfig
from evaluation.model_card import build_model_card, read_reports
from runtime.checkpoint import describe_best, write_manifest
from runtime.legacy import RENAMED
from runtime.run_dir import Run
from runtime.run_files import append_metrics
from utils.logging_utils import setup_logging
from utils.tokenizer_utils import Prompt

PROMPT = Prompt("[INST] <image>\nWhat? [/INST]", " ", "</s>", 2)
RECORDED = {
    "model_commit": "c0ffee", "precision": "bf16", "device": "NVIDIA H100", "ranks": 2,
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


def card_of(folder, config=None, recorded=RECORDED, prompt=PROMPT):
    config = config or TrainingConfig()
    return build_model_card(Run(dataclasses.replace(config, output_dir=str(folder)), recorded), prompt)


def report(folder, split, **changed):
    pair = {"names": ["ash", "oak"], "confused": 3}
    per_class = {"ash": {"n": 10, "top1": 0.7}, "oak": {"n": 10, "top1": 0.9}}
    found = {
        "split": split,
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
    found |= {"per_class": per_class, "ood": {"noise": {"n": 40, "abstention_rate": 0.5}}} | changed
    (folder / f"eval_{split}.json").write_text(json.dumps(found))


def test_a_card_says_what_the_run_found(folder):
    report(folder, "val")
    report(folder, "test", top1=0.75)
    text = card_of(folder, TrainingConfig(model="me/base", dataset="oxford_flowers102"))
    card = ModelCard(text)
    assert card.data.base_model == "me/base" and card.data.library_name == "peft"
    assert {(result.dataset_split, result.metric_value) for result in card.data.eval_results} == {
        ("val", 0.8),
        ("test", 0.75),
    }
    for words in (
        "Not for deciding whether a plant is edible or poisonous", "`me/base` at commit `c0ffee`", "336 x 336 pixels",
        "| test | 20 | 0.750 (0.580 to 0.920) | 1.000 | 0.800 | 0.040 | 0.600 | 1.000 |", "| ash | oak | 3 |",
        "| ash | 10 | 0.700 |", "/ 1.500; no confidence reached a selective accuracy of 0.95 on 20", "noise 50%.",
        "Trained on 2 x NVIDIA H100: 1.0 minutes of optimizer steps, peak memory 5.2 GiB. torch 2.13.0.",
        "The weights are those of step 2 of 2 steps; global batch size 16, LoRA rank 16",
        "Nilsback and Zisserman 2008", "its license could not be read", "in its own splits",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize(
    "changed",
    [
        {"adapter": "step 1, manifest 0"},
        {"per_token": True},
        {"prior_calibration": True},
        {"limit": 4},
        {"dataset": "others"},
    ],
)
def test_reports_of_other_weights_or_scores_are_excluded(folder, changed):
    report(folder, "val", **changed)
    text = card_of(folder)
    assert "It was not measured." in text and "| val |" not in text


def test_prediction_sets_are_on_the_card_where_they_were_measured(folder):
    sets = {"method": "aps", "target": 0.9, "coverage": 0.91, "coverage_interval": [0.87, 0.94], "mean_size": 1.357}
    words = (
        "APS, fitted on val for a coverage of 0.9) contain the true name of 91.0% of the images of test (95% interval"
    )
    report(folder, "test", conformal=sets)
    assert f"{words} 87.0% to 94.0%), with 1.36 names on average" in card_of(folder)
    report(folder, "test", conformal=sets | {"mean_size_interval": [1.2, 1.514]})
    assert "1.36 names on average (95% interval 1.20 to 1.51). That holds" in card_of(folder)
    report(folder, "test", conformal=sets | dict.fromkeys(("method", "coverage", "coverage_interval", "mean_size")))
    assert "Prediction sets" not in card_of(folder)


def test_the_code_of_4_bit_weights_turns_off_what_would_repack_them(folder):
    run = Run(dataclasses.replace(TrainingConfig(trainable="everything"), output_dir=str(folder)), RECORDED)
    line = "        module.support_avx512bf16_for_cpu = False"
    text = build_model_card(run, PROMPT, is_merged=True, is_4bit=True)
    assert text.index("model = LlavaNext") < text.index(line) < text.index("model.generate(")
    assert line not in build_model_card(run, PROMPT, is_merged=True)


def test_genus_and_family_are_on_the_card(folder):
    level = dict.fromkeys(("taxa", "classes", "accepted", "correct"), 1)
    tree = {"rejected": 8, "accepted": 4, "correct": 3, "share_correct": 0.375, "precision": 0.75}
    tree |= {"share_interval": [0.1, 0.7], "precision_interval": [0.3, 0.95], "genus": level, "family": level}
    report(folder, "test", hierarchy=tree)
    assert "Of 8 such images of test, 3 get a right one; of those that get one, 75.0% is right" in card_of(folder)
    none = {"accepted": 0, "correct": 0, "share_correct": 0.0, "precision": None, "precision_interval": None}
    report(folder, "test", hierarchy=tree | none)
    assert "which it is for none of 8 such images of test.\n\n" in card_of(folder)


NOTICED = {"score": "tower_knn", "threshold": 0.5, "kept": 0.95, "rates": {"known": 0.05}, "missing": None}
PROBED = {f"{name}_{key}": 0.5 for name in ("linear", "knn") for key in ("top1", "top5", "mean_per_class")}
PROBED |= {"advice": "use it", "seconds": 1.5, "train_images": 4, "of_train_images": 9}


@pytest.mark.parametrize(
    ("name", "whole", "key"),
    [("probe", PROBED, key) for key in PROBED]
    + [("none_of_these", NOTICED, key) for key in NOTICED if key != "missing"],
)
def test_a_report_with_half_a_table_is_excluded(folder, name, whole, key):
    """Its template could not be filled in, and an export would end with it."""
    report(folder, "test", **{name: whole})
    assert "On test:" in card_of(folder)
    report(folder, "test", **{name: {given: value for given, value in whole.items() if given != key}})
    assert "On test:" not in card_of(folder)


@pytest.mark.parametrize("gone", ["coverage", "selective_accuracy"])
def test_a_report_without_the_share_that_gets_a_name_is_used(folder, gone):
    """It is of an earlier program."""
    shares = {"coverage": 0.9, "selective_accuracy": 0.97}
    report(folder, "test", none_of_these=NOTICED | shares)
    assert "So 90% of test get a name, 97.0% of these the right one." in card_of(folder)
    del shares[gone]
    report(folder, "test", none_of_these=NOTICED | shares)
    assert "On test:" in card_of(folder) and "get a name" not in card_of(folder)


def test_a_truncated_report_is_excluded_and_said(folder, capsys):
    setup_logging()
    report(folder, "val")
    (folder / "eval_test.json").write_text('{"split": "te')
    assert list(read_reports(folder, describe_best(folder / "best"), "oxford_flowers102")) == ["val"]
    again = f"make it again: python evaluate.py {folder} --split test"
    printed = capsys.readouterr().out
    assert "eval_test.json: is not quoted (Unterminated string" in printed and again in printed


def test_an_adapter_of_a_base_that_is_saved_nowhere_has_no_code(folder):
    text = card_of(folder, TrainingConfig(model="tiny", dataset="synthetic"))
    assert "saved nowhere" in text and "```" not in text


def test_a_base_in_a_folder_is_named_and_its_license_read(folder, tmp_path):
    base = tmp_path / "secret place" / "llava"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# It\n")
    config = TrainingConfig(model=str(base), dataset=str(tmp_path / "secret place" / "my plants"), image_size=None)
    text = card_of(folder, dataclasses.replace(config, question="What tree?"))
    assert "apache-2.0, as its model card states" in text and ModelCard(text).data.license == "apache-2.0"
    assert "secret place" not in text and "`my plants`" in text and "at their own size" in text


@pytest.mark.parametrize("size", [336, None])
def test_the_code_is_python(folder, size):
    config = TrainingConfig(image_size=size, trainable="everything", load_in_4bit=False)
    (code,) = re.findall(r"```python\n(.*?)```", card_of(folder, config), re.DOTALL)
    compile(code, "card", "exec")
    assert (".resize((336, 336), Image.Resampling.BICUBIC)" in code) == (size == 336) and "peft" not in code


def test_text_of_users_is_data_and_never_markup(tmp_path, folder):
    renamed_folder = folder.rename(tmp_path / "a: [b] `c` {{ 7 * 7 }} --- | # *d*")
    names = ["oak | {{ 7 * 7 }}", "<script>*ash*</script>"]
    pair = {"names": names, "confused": 1}
    report(
        renamed_folder,
        "val",
        confusions=[pair],
        per_class={name: {"n": 1, "top1": 0.5} for name in names},
        dataset="x`y",
    )
    config = TrainingConfig(dataset="x`y", question='What\nis "this" | ---\n# it?')
    prompt = PROMPT._replace(prompt='[INST] "<image>"\n```\n\'\\ {{ 7 * 7 }}')
    text = card_of(renamed_folder, config, RECORDED | {"class_names": names}, prompt)
    card = ModelCard(text)
    assert card.data.model_name == renamed_folder.name and card.data.eval_results[0].dataset_name == "x`y"
    assert card.text.strip().startswith(r"# a: \[b\] \`c\` {{ 7 \* 7 }} --- \| # \*d\*: 2 plants")
    assert r"| oak \| {{ 7 \* 7 }} | \<script\>\*ash\*\</script\> | 1 |" in text and "`x'y`" in text
    assert r'the question "What is "this" \| --- # it?".' in text and "49" not in text
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert repr(prompt.prompt) in code
    compile(code, "card", "exec")


def test_a_report_of_an_older_run_is_read_under_its_new_keys(folder):
    report(folder, "val")
    path = folder / "eval_val.json"
    old_keys = {new: old for old, new in RENAMED.items()}
    text = card_of(folder)
    older = json.loads(
        path.read_text(), object_hook=lambda entry: {old_keys.get(key, key): entry[key] for key in entry}
    )
    path.write_text(json.dumps(older))
    assert not {"coverage", "selective_accuracy", "confusions", "ood"} & set(older)
    assert card_of(folder) == text

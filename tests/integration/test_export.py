"""export.py: what is exported loads without this project and predicts what was validated."""

import base64
import dataclasses
import functools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

import export
from data.synthetic import draw_split
from evaluation import verify
from models import merging
from models.builder import PlantModel
from runtime.run_dir import Run
from tests.conftest import TINY, run_printed

FAST = ["--num-workers", "0"]
# Appended to the code in the README.md of an export, which runs without this project.
CHECKS = """
import sys
together = ids[:, inputs["input_ids"].shape[1] :].tolist()
alone = []
for image in images:
    one = processor(images=[image], text=prompts[:1], return_tensors="pt", padding=True)
    lengths = one["input_ids"].shape[1]
    alone.append(model.generate(**one.to(model.device, model.dtype), max_new_tokens=20, do_sample=False)[0, lengths:])
for reply, own in zip(together, alone):
    assert reply[: len(own)] == own.tolist(), (reply, own)
print(len(together), sorted({len(row) for row in inputs["attention_mask"].tolist()}), inputs["attention_mask"].sum(1))
"""


run = functools.partial(run_printed, export.main)


def synthetic_images(folder, sizes) -> list[str]:
    from io import BytesIO

    from PIL import Image

    files = []
    for number, (row, size) in enumerate(zip(draw_split("test"), sizes)):
        files.append(str(folder / f"{number}.png"))
        Image.open(BytesIO(row["image"]["bytes"])).resize(size).save(files[-1])
    return files


def readme_code(out: Path, files: list[str], checks: str = CHECKS) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    code = code.replace('files = ["photo.jpg"]', f"files = {files!r}") + checks
    return code.replace("max_new_tokens=20", "max_new_tokens=6")


def run_readme_code_alone(out: Path, files: list[str]) -> subprocess.CompletedProcess:
    """The code of README.md and CHECKS, in a process that cannot import this project."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = readme_code(out, files) + 'assert "models" not in sys.modules and "data" not in sys.modules\n'
    return subprocess.run([sys.executable, "-c", code], cwd=out, env=environment, capture_output=True, text=True)


def run_readme_code(out: Path, files: list[str], monkeypatch, checks: str = CHECKS) -> dict:
    """The names that the code of README.md and `checks` define, in this process."""
    names: dict = {}
    with monkeypatch.context() as patch:
        patch.chdir(out)
        exec(readme_code(out, files, checks), names)
    return names


def test_a_whole_model_is_exported_for_plain_transformers(trained, here, capsys):
    (here / "tiny.old").mkdir()  # an export that was moved out of the way
    (here / "tiny.old" / "mine.txt").touch()
    assert run(capsys, "one", "tiny", *FAST)[0] == 0  # in the working directory, under the name of a random model
    assert os.listdir(here / "tiny.old") == ["mine.txt"]
    status, output = run(capsys, "one", "out", "--dtype", "fp32", *FAST)
    assert (
        status == 0
        and "result | verified: its logits differ by 0.00% from those of the run's weights; top-1 0." in output
    )
    files = {path.name for path in (here / "out").iterdir()}
    assert files == {
        "README.md", "class_names.json", "config.json", "generation_config.json", "model.safetensors",
        "chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert {stat.S_IMODE(path.stat().st_mode) for path in (here / "out").iterdir()} == {0o644}
    assert not (here / "out.draft").exists()
    classes = json.loads((here / "out" / "class_names.json").read_text())
    assert len(classes["class_names"]) == 10 and classes["image_size"] == 70 and "temperature" in classes
    ours, theirs = load_file(trained / "best" / "model.safetensors"), load_file(here / "out" / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and len(ours) == len(theirs)
    found = run_readme_code_alone(here / "out", synthetic_images(here, [(84, 84), (40, 90), (84, 84)]))
    assert found.returncode == 0 and found.stdout.splitlines()[-1].startswith("3 "), found.stderr


def test_images_of_different_lengths_are_padded_on_the_left(here, image_folder, checkpoint, monkeypatch, capsys):
    """At their own size images have different numbers of image tokens; right padding would garble the shorter ones."""
    import train

    root = image_folder({"oak": 10, "ash": 10})
    wide = shutil.copytree(checkpoint(), here / "base")
    for name in ("config.json", "processor_config.json"):
        text = (wide / name).read_text()
        (wide / name).write_text(re.sub(r"(\"image_grid_pinpoints\": \[)", r"\1[70, 140], [140, 70], ", text))
    argv = [*TINY, "--dataset", str(root), "--model", str(wide), "--image-size", "none", "--trainable", "adapter"]
    assert train.main([*argv, "--output-dir", "own", "--max-steps", "1"]) == 0
    assert run(capsys, "own", "out", "--dtype", "fp32", *FAST)[0] == 0
    assert "own size" in (here / "out" / "README.md").read_text()
    files = synthetic_images(here, [(84, 84), (60, 130), (130, 60)])
    mask = run_readme_code(here / "out", files, monkeypatch)["inputs"]["attention_mask"]
    assert len(set(mask.sum(1).tolist())) > 1


def test_an_adapter_is_merged_as_PEFT_applies_it(trained_lora, here, checkpoint, capsys):
    """Compared with PEFT itself, which the export does not use for its verification."""
    status, output = run(capsys, "two", "out", "--dtype", "fp32", *FAST)
    assert status == 0 and re.search(r"its logits differ by 0.00% from .* without the adapter: \d", output)
    base = LlavaNextForConditionalGeneration.from_pretrained(checkpoint(), dtype=torch.float32)
    beside = PeftModel.from_pretrained(base, trained_lora / "best").eval()
    merged = LlavaNextForConditionalGeneration.from_pretrained(here / "out").eval()
    processor = AutoProcessor.from_pretrained(here / "out")
    from PIL import Image

    image = Image.new("RGB", (70, 70), (200, 30, 60))
    text = json.loads((here / "out" / "class_names.json").read_text())["prompt"]
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    with torch.no_grad():
        expected, found = beside(**inputs).logits, merged(**inputs).logits
        with beside.disable_adapter():
            base_logits = beside(**inputs).logits
    assert (found - expected).abs().max() < 1e-4 < 0.1 < (base_logits - expected).abs().max()


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_16_bit_is_the_default_and_the_verification_states_it(dtype, kind, trained_lora, here, capsys):
    status, output = run(capsys, "two", "out", *([] if dtype == "bf16" else ["--dtype", dtype]), *FAST)
    assert status == 0 and "model | merging two/best into " in output and f" | {dtype}\n" in output
    assert {weight.dtype for weight in load_file(here / "out" / "model.safetensors").values()} == {kind}
    model_card = (here / "out" / "README.md").read_text()
    assert f"Merged in {dtype} and loaded afresh: its logits differ by" in model_card and "was validated" in model_card


@pytest.mark.parametrize("kind", ["adapter", pytest.param("base view", marks=pytest.mark.slow)])
def test_nf4_on_disk_is_loaded_back_by_plain_transformers(kind, base_run, trained_lora, here, monkeypatch, capsys):
    if kind == "base view":
        shutil.copytree(base_run("everything").folder, here / "one")
    status, output = run(capsys, "two" if kind == "adapter" else "one", "out", "--dtype", "nf4", *FAST)
    assert status == 0 and "result | verified: its logits differ by" in output, output
    saved = load_file(here / "out" / "model.safetensors")
    in_4bit = {name.partition(".weight.quant_state")[0] for name in saved if ".quant_state." in name}
    assert len(in_4bit) == 3 * 7 and all("language_model" in name for name in in_4bit)
    assert {saved[name].dtype for name in saved if "vision" in name or "projector" in name} == {torch.bfloat16}
    model_class = LlavaNextForConditionalGeneration if kind == "adapter" else LlavaForConditionalGeneration
    loaded = model_class.from_pretrained(here / "out", dtype="auto", device_map="cpu")
    assert (
        loaded.is_loaded_in_4bit
        and "Merged in nf4 and loaded afresh: its logits" in (here / "out/README.md").read_text()
    )
    loop = re.search(r"^for module in .*(?:\n .*)+", (here / "out/README.md").read_text(), re.MULTILINE)[0]
    exec(loop, {"model": loaded})
    flags = [module.support_avx512bf16_for_cpu for module in loaded.modules() if type(module).__name__ == "Linear4bit"]
    assert flags == [False] * 3 * 7


def test_4_bit_weights_that_load_otherwise_are_not_exported(trained_lora, here, monkeypatch, capsys):
    real = verify.load_whole

    def load(folder, dtype, device, in_4bit=False):
        model, is_saved = (
            real(folder, dtype, device, in_4bit),
            "quantization_config" in (folder / "config.json").read_text(),
        )
        if is_saved:
            model.lm_head.weight.data *= 1.2
        return model

    monkeypatch.setattr(verify, "load_whole", load)
    status, output = run(capsys, "two", "out", "--dtype", "nf4", *FAST)
    assert status == 1 and "what was saved in 4 bit is not what was quantized: its logits differ by 20" in output
    assert not (here / "out").exists()


def test_the_adapter_alone(trained_lora, here, checkpoint, monkeypatch, capsys):
    (trained_lora / "eval_val.scores.jsonl").unlink()  # it is not compared with them: an interrupted run has none
    status, output = run(capsys, "two", "out", "--adapter-only", *FAST)
    assert status == 0 and "result | verified" in output
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "class_names.json", "tokenizer.json"} <= {
        path.name for path in (here / "out").iterdir()
    }
    settings = json.loads((here / "out" / "adapter_config.json").read_text())
    assert "/" not in settings["base_model_name_or_path"]  # the folder of the base model stays private
    base = LlavaNextForConditionalGeneration.from_pretrained(checkpoint(), dtype=torch.float32)
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, here / "out"))
    saved = load_file(trained_lora / "best" / "adapter_model.safetensors")
    assert set(loaded) == set(saved) and all(torch.equal(loaded[name], saved[name]) for name in saved)
    files = synthetic_images(here, [(84, 84), (40, 90)])
    shutil.copytree(
        checkpoint(), here / "out" / settings["base_model_name_or_path"]
    )  # where the model model_card says it is
    run_readme_code(here / "out", files, monkeypatch)


def test_a_run_trained_on_val_is_exported_without_an_accuracy(here, small_splits, run_on_val, capsys):
    shutil.copytree(run_on_val.folder, here / "run")
    status, output = run(capsys, "run", "out", *FAST)
    assert status == 0 and "its accuracy is unknown, since the run was trained on val" in output
    assert "It was not measured." in (here / "out" / "README.md").read_text()


@pytest.mark.parametrize("trainable", ["adapter", "projector"])
def test_other_trainable_parameters_are_merged(trainable, here, small_splits, checkpoint, capsys):
    """With an image of val that does not open among the first, and a base that would draw names by lot."""
    import train

    base = shutil.copytree(checkpoint(), here / "base")
    generation = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(generation | {"temperature": 0.9, "top_p": 0.6}))
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    images = here / "images"
    for split, count in (("train", 8), ("val", 6), ("test", 2)):
        for name in ("ash", "oak"):
            (images / split / name).mkdir(parents=True)
            for file in map(Path, synthetic_images(images / split / name, [(60, 60)] * count)):
                file.write_bytes(file.read_bytes() + f"{file}".encode())  # no copies
    (images / "val" / "ash" / "0.png").write_bytes(b"broken")
    argv = [
        *TINY,
        "--model",
        str(base),
        "--trainable",
        trainable,
        "--dataset",
        str(images),
        "--max-bad-fraction",
        "0.5",
    ]
    assert train.main([*argv, "--learning-rate", "0.01", "--output-dir", "run"]) == 0
    assert "scores of 4 images reproduced" in capsys.readouterr().out
    status, output = run(capsys, "run", "out", "--dtype", "fp32", *FAST)
    assert status == 0 and "its logits differ by 0.00% from" in output
    assert json.loads((here / "out" / "generation_config.json").read_text())["do_sample"] is False
    assert "its license could not be read" in (here / "out" / "README.md").read_text()


@pytest.mark.parametrize("flags", [[], ["--adapter-only"]])
def test_a_base_whose_files_changed_is_not_merged_into(flags, trained_lora, here, checkpoint, capsys):
    config = trained_lora / "training_config.json"
    other = shutil.copytree(checkpoint(), here / "base")
    config.write_text(config.read_text().replace(checkpoint(), str(other)))
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.3 * weight for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    status, output = run(capsys, "two", "out", *flags, *FAST)
    assert (
        status == 1 and "is not what two was trained on (model_files differ)" in output and not (here / "out").exists()
    )


def test_a_calibration_of_other_weights_is_not_exported(trained, here, capsys):
    path = trained / "calibration.json"
    path.write_text(path.read_text().replace("step 6", "step 5"))
    assert run(capsys, "one", "out", *FAST)[0] == 0
    assert "temperature" not in json.loads((here / "out" / "class_names.json").read_text())


def test_the_model_card_describes_the_training_not_the_export(trained_lora, here, capsys):
    assert run(capsys, "two", "out", "--load-in-4bit", "false", *FAST)[0] == 0
    assert "base model in 4 bit (nf4)" in (here / "out" / "README.md").read_text()


# ---- the base view alone


@pytest.fixture(scope="session")
def base_run(train_once, checkpoint):
    """base_run(what is trained): a run that sees the base view of an image alone; its adapter beside a 4-bit base."""

    def make(trainable: str):
        if trainable == "everything":
            return train_once("--views", "base")
        flags = ["--model", checkpoint(), "--load-in-4bit", "true", "--trainable", "adapter", "--lora-r", "4"]
        return train_once(*flags, "--learning-rate", "0.01", "--mixed-precision", "no", "--views", "base")

    return make


@torch.no_grad()
def plain_scores(names: dict, classes: dict) -> torch.Tensor:
    """(C,) log-probabilities of all class names by the model and processor of an export's README.md alone."""
    model, processor, scores = names["model"].eval(), names["processor"], []
    prompt = processor(images=names["images"], text=[classes["prompt"]], return_tensors="pt")["input_ids"]
    for name in classes["class_names"]:
        text = classes["prompt"] + classes["response_prefix"] + name + classes["eos"]
        inputs = processor(images=names["images"], text=[text], return_tensors="pt")
        sizes = {"image_sizes": names["inputs"]["image_sizes"]} if "image_sizes" in names["inputs"] else {}
        logs = model(**inputs, **sizes).logits[0].float().log_softmax(dim=-1)
        places = range(prompt.shape[1], inputs["input_ids"].shape[1])
        scores.append(sum(logs[place - 1, inputs["input_ids"][0, place]] for place in places))
    return torch.stack(scores)


@pytest.mark.parametrize("kind", ["everything", "adapter", "adapter only"])
def test_plain_transformers_scores_base_views_alike(kind, base_run, here, small_splits, monkeypatch, capsys):
    source = base_run(kind)
    assert " | 26 image tokens/image | " in source.output and "70 x 70 pixels, base view alone" in source.output
    trained = shutil.copytree(source.folder, here / "one")
    flags = ["--adapter-only"] if kind == "adapter only" else ["--dtype", "fp32"]
    assert run(capsys, "one", "out", *flags, *FAST)[0] == 0
    (file,) = synthetic_images(here, [(84, 60)])
    found = Run.load(trained)
    (here / "out" / Path(found.config.model).name).symlink_to(found.config.model)  # where the README.md says it is
    names = run_readme_code(here / "out", [file], monkeypatch, checks="")
    is_llava = kind != "adapter only"
    assert type(names["model"]).__name__ == ("LlavaForConditionalGeneration" if is_llava else "PeftModelForCausalLM")
    # What was merged is the base model that was not quantized.
    found.config = dataclasses.replace(found.config, num_workers=0, load_in_4bit=False)
    plant = PlantModel.from_run(found, torch.device("cpu"))
    ((((_, expected),), _),) = plant.score([{"image": {"bytes": None, "path": file}, "label": 0, "id": "0"}])
    scores = plain_scores(names, json.loads((here / "out" / "class_names.json").read_text()))
    assert (scores - torch.tensor(expected)).abs().max() < 1e-4
    assert scores.argsort().tolist() == torch.tensor(expected).argsort().tolist()


def test_a_run_of_base_views_stays_one(base_run, here, small_splits, capsys):
    import predict
    import train

    shutil.copytree(base_run("everything").folder, here / "one")
    (file,) = synthetic_images(here, [(200, 50)])
    assert run_printed(predict.main, capsys, "one", file, *FAST)[0] == 0
    status, output = run_printed(train.main, capsys, *TINY, "--output-dir", "one")
    assert status != 0 and "holds a run with another config (views: base -> anyres); give a new folder" in output
    for main in (predict.main, export.main):
        status, output = run_printed(main, capsys, "one", file, "--views", "anyres")
        assert status == 2 and "error: --views anyres: is fixed by the run" in output


def test_gguf_files_need_their_packages(base_run, here, small_splits, monkeypatch, capsys):
    shutil.copytree(base_run("everything").folder, here / "one")
    monkeypatch.setitem(sys.modules, "cyllama", None)
    status, output = run(capsys, "one", "out", "--format", "gguf", *FAST)
    assert status == 1 and not (here / "out").exists()
    assert re.search(r"needs the packages gguf and cyllama \(.*\); run: pip install -r requirements-gguf.txt", output)


# ---- what must not be exported


def wrong_scale(monkeypatch):
    real = merging.read_adapter

    def read(folder, settings):
        adapter = real(folder, settings)
        return adapter._replace(scale=0.0)

    attach = verify.attach_adapter  # keeps the right scale

    def attach_scaled(base, adapter, device):
        return attach(base, adapter._replace(scale=8.0), device)

    monkeypatch.setattr(merging, "read_adapter", read)
    monkeypatch.setattr(verify, "attach_adapter", attach_scaled)


def one_weight_lost(monkeypatch):
    real = merging.save_file

    def save(weights, *args, **kwargs):
        name = next(name for name in weights if "down_proj" in name)
        real(weights | {name: torch.zeros_like(weights[name])}, *args, **kwargs)

    monkeypatch.setattr(merging, "save_file", save)


def worse_accuracy(monkeypatch):
    metrics = {"n": 300, "first": 0.9, "second": 0.8, "only_first": 40, "only_second": 10, "p": 1e-5}
    monkeypatch.setattr(verify, "compare_with_validated", lambda *args: metrics)


def disk_full(monkeypatch):
    def save(*args, **kwargs):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(merging, "save_file", save)


def interrupted(monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "check_merge", stop)


FAULTS = [
    (wrong_scale, "error: what was saved is not what was trained: its logits"),
    (one_weight_lost, "error: what was saved is not what was trained: its logits"),
    (worse_accuracy, "error: the merged model is worse than what was validated: "),
    (disk_full, "error: model.safetensors: No space left on device; free space"),
    (interrupted, "warning: interrupted; nothing was exported"),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_nothing_is_left_of_an_export_that_failed(fault, words, trained_lora, here, monkeypatch, capsys):
    fault(monkeypatch)
    status, output = run(capsys, "two", "out", "--dtype", "fp32", *FAST)
    assert status != 0 and words in output and not list(here.glob("out*"))


def test_an_export_that_was_killed_starts_again(trained, here, capsys):
    (here / "out.draft").mkdir()
    (here / "out.draft" / "half.safetensors").write_bytes(b"half")
    (here / "out.lock").touch()
    (here / "out").mkdir()  # empty
    (here / "out.old").mkdir()  # the user's, as by mv out out.old
    assert run(capsys, "one", "out", *FAST)[0] == 0
    assert "half.safetensors" not in os.listdir(here / "out") and not (here / "out.draft").exists()
    assert (here / "out.old").is_dir() and not (here / "out.lock").exists()


def nothing(folder):
    pass


def no_scores(folder):
    (folder / "eval_val.scores.jsonl").unlink()


def no_weights(folder):
    shutil.rmtree(folder / "best")


def as_base(folder):
    path = folder / "training_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"recorded": saved["recorded"] | {"base": True}}))


def as_full(folder):
    path = folder / "training_config.json"
    path.write_text(path.read_text().replace('"model": "tiny"', '"model": "full"').replace('"everything"', '"adapter"'))


def taken(folder):
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "mine.txt").write_text("mine")


def other_draft(folder):
    (folder.parent / "out.draft" / "thesis").mkdir(parents=True)


def other_lock(folder):
    (folder.parent / "out.lock").write_text("numpy==2.5")


def link(folder):
    (folder.parent / "out").symlink_to("elsewhere")


def other_images(folder):
    path = folder / "training_config.json"
    path.write_text(path.read_text().replace('"data_fingerprint": "', '"data_fingerprint": "0'))


BAD_INPUT = [
    (nothing, [], "error: RUN is missing; usage: RUN OUT. Runs here: none yet"),
    (nothing, ["one"], "error: one: OUT is missing after it; usage: RUN OUT"),
    (nothing, ["one", "out", "more"], "error: more: unexpected argument; usage: RUN OUT"),
    (nothing, ["none", "out"], "error: none: not a run, training_config.json is missing"),
    (nothing, ["one", "out", "--dtype", "int8"], "error: dtype=int8: not one of bf16, fp16, fp32, nf4"),
    (nothing, ["one", "out", "--adapter-only", "--dtype", "fp32"], "error: dtype=fp32 with adapter_only=true: an"),
    (nothing, ["one", "out", "--adapter-only", "--limit", "3"], "error: limit=3 with adapter_only=true: an adapter's"),
    (nothing, ["one", "out", "--adapter-only", "--format", "gguf"], "error: format=gguf with adapter_only=true: the"),
    (nothing, ["one", "out", "--format", "gguf", "--dtype", "fp16"], "error: dtype=fp16 with format=gguf: it is"),
    (nothing, ["one", "out", "--quantize", "q8_0"], "error: quantize=q8_0 with format=safetensors: only gguf"),
    (nothing, ["one", "out", "--format", "gguf"], "error: one: was trained with --views anyres, and llama.cpp makes"),
    (nothing, ["one", "out", "--adapter-only"], "error: one: all weights were trained, there is no adapter"),
    (nothing, ["one", "out", "--push-to-hub", "me/x"], "error: me/x: the hub refuses ("),
    (nothing, ["one", "out", "--dataset", "{images}"], "its 2 classes are not the 10 that one learned (ash, oak)"),
    (taken, ["one", "out"], "error: out: already exists; use a new folder"),
    (other_draft, ["one", "out"], "error: out.draft: exists and is not of an export; move it"),
    (other_lock, ["one", "out"], "error: out.lock: exists and is not of an export; move it"),
    (link, ["one", "out"], "error: out: is a link, a disk or the working directory"),
    (nothing, ["one", "."], "error: .: is a link, a disk or the working directory"),
    (no_weights, ["one", "out"], "error: one/best: holds no complete weights"),
    (no_scores, ["one", "out"], "no scores yet; make them first: python evaluate.py one --split val"),
    (as_base, ["one", "out"], "error: one: is a base model, nothing was trained"),
    (as_full, ["one", "out"], "error: one: its randomly initialized base model existed on a GPU only"),
    (other_images, ["one", "out"], "its images changed since one was trained"),
]


@pytest.mark.parametrize(("corrupt", "argv", "words"), BAD_INPUT, ids=[words[7:47] for *_, words in BAD_INPUT])
def test_bad_input(corrupt, argv, words, trained, here, image_folder, capsys):
    corrupt(trained)
    images = str(image_folder({"oak": 10, "ash": 10}))
    status, output = run(capsys, *[word.format(images=images) for word in argv], *FAST)
    assert status != 0 and words in output and "Traceback" not in output
    assert not (here / "out").exists() or os.listdir(here / "out") == ["mine.txt"]
    assert not (here / "out.draft").exists() or os.listdir(here / "out.draft") == ["thesis"]


def test_a_full_disk_is_reported_before_any_work(trained, here, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    status, output = run(capsys, "one", "out", *FAST)
    assert status == 1 and "its disk has 0.0 GB free, the merged weights need 0.1 GB; free space" in output


# ---- merging


def merge(tmp_path, base: dict, adapter=None, dtype=torch.float32) -> dict:
    (tmp_path / "base").mkdir(exist_ok=True)
    (tmp_path / "out").mkdir(exist_ok=True)
    save_file(base, tmp_path / "base" / "model.safetensors")
    merging.merge_into(tmp_path / "base", adapter, tmp_path / "out", dtype)
    found = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    return found


NAME = "language_model.model.layers.0.self_attn.q_proj"
PAIR = torch.full((2, 3), 2.0), torch.full((4, 2), 3.0)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_weights_are_found_under_old_and_new_names(prefix, tmp_path):
    name = prefix + "layers.0.self_attn.q_proj.weight"
    adapter = merging.Adapter({"model.language_model.layers.0.self_attn.q_proj": PAIR}, {}, scale=0.5)
    found = merge(tmp_path, {name: torch.ones(4, 3), "image_newline": torch.ones(4)}, adapter)
    assert torch.equal(found[name], torch.full((4, 3), 7.0)) and torch.equal(found["image_newline"], torch.ones(4))


def test_many_files_have_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SHARD_BYTES", 100)
    weights = {f"language_model.model.layers.{layer}.w": torch.full((4, 4), float(layer)) for layer in range(5)}
    found = merge(tmp_path, weights | {"position_ids": torch.arange(4)}, dtype=torch.bfloat16)
    assert {name: weight.dtype for name, weight in found.items()} == {
        name: torch.bfloat16 if "layers" in name else torch.int64 for name in found
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(weights) | {"position_ids"} and len(set(index.values())) == 2
    assert merging.weights_bytes(tmp_path / "out", torch.float32) == 4 * (5 * 16 + 4)


def test_weights_that_cannot_be_merged_are_refused(tmp_path):
    adapter = merging.Adapter({"model.language_model.layers.0.self_attn.q_proj": PAIR}, {}, scale=1.0)
    with pytest.raises(merging.UserError, match="is not in 16 bit .* merging into 4 bit would change"):
        merge(tmp_path, {f"{NAME}.weight": torch.ones(4, 3, dtype=torch.uint8)}, adapter)
    with pytest.raises(merging.UserError, match="1 weights of the adapter have no place in it"):
        merge(tmp_path, {"image_newline": torch.ones(4)}, adapter)
    with pytest.raises(merging.UserError, match="image_newline: is too large for torch.float16; use --dtype bf16"):
        merge(tmp_path, {"image_newline": torch.full((4,), 1e6)}, dtype=torch.float16)


# ---- the hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for; keeps what was committed."""

    files, private, refuses = None, None, None

    def do_GET(self):
        if Hub.refuses == "create":
            self.send_response(404)
            self.end_headers()
        else:
            self._answer({"id": "me/plants", "sha": "0" * 40, "siblings": []})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if Hub.refuses and Hub.refuses in self.path:
            self.send_response(401)
            self.end_headers()
            return
        if self.path.endswith("/repos/create"):
            Hub.private = (
                json.loads(body)["private"] if "private" in json.loads(body) else json.loads(body)["visibility"]
            )
            self._answer({"url": f"http://{self.headers['Host']}/me/plants", "name": "me/plants"})
        elif "preupload" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif "commit" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    Hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer(
                {
                    "success": True,
                    "commitOid": "1" * 40,
                    "commitUrl": f"http://{self.headers['Host']}/me/plants/commit/1",
                }
            )
        else:
            self._answer({})

    def _answer(self, found: dict):
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    Hub.files, Hub.refuses = {}, None
    yield Hub
    server.shutdown()


def test_the_same_files_go_to_the_hub(trained_lora, here, hub, capsys):
    status, output = run(capsys, "two", "out", "--adapter-only", "--push-to-hub", "me/plants", *FAST)
    assert status == 0 and "saved | http" in output, output
    assert hub.private
    assert {name: len(content) for name, content in hub.files.items()} == {
        path.name: path.stat().st_size for path in (here / "out").iterdir()
    }
    assert not [name for name, content in hub.files.items() if b"hf_secret" in content]


@pytest.mark.parametrize("step", ["create", "commit"])
def test_a_refusal_of_the_hub_is_reported_and_the_export_stays(step, trained, here, hub, capsys):
    hub.refuses = step
    status, output = run(capsys, "one", "out", "--push-to-hub", "me/plants", *FAST)
    assert status == 1 and "error: me/plants: the hub refuses (" in output and "Traceback" not in output
    is_complete = "out is complete; upload it with: hf upload me/plants out" in output
    assert is_complete == (here / "out").exists() == (step == "commit")


def test_a_missing_network_is_reported_before_any_work(trained, here, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    status, output = run(capsys, "one", "out", "--push-to-hub", "me/plants", *FAST)
    assert status == 1 and "error: me/plants: the hub refuses (" in output and "merging" not in output


def test_two_exports_cannot_write_to_one_staging_directory(trained, here, capsys):
    import filelock

    (here / "out.draft").mkdir()
    with filelock.FileLock(here / "out.lock"):
        status, output = run(capsys, "one", "out", *FAST)
    assert status == 1 and "error: out.draft: another export writes to it" in output and (here / "out.draft").exists()

"""export.py --format gguf, with the packages of requirements-gguf.txt: what llama.cpp computes of the files."""

import functools
import json
import re
import shutil

import gguf
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import LlavaNextConfig, LlavaNextProcessor, PreTrainedTokenizerFast

import export
import models.gguf_files as files
import train
from data.synthetic import SPECIES
from evaluation import gguf_export
from evaluation.llama_cpp import LlamaCpp, runtime_versions
from models.builder import PlantModel
from models.tiny import SIZES, build_config, build_tiny_model
from tests.conftest import QUESTION, TINY, run_printed, use_small_splits, working_folder
from tests.integration.test_export import synthetic_images

FAST = ["--num-workers", "0", "--format", "gguf"]
run = functools.partial(run_printed, export.main)


@pytest.fixture(scope="session")
def base_run(train_once):
    return train_once("--views", "base").folder


@pytest.fixture
def trained(base_run, here, small_splits):
    return shutil.copytree(base_run, here / "one")


@pytest.fixture(scope="module")
def exported(base_run, tmp_path_factory):
    """An export of what llama.cpp itself has classified all 20 images of val with."""
    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch, working_folder(folder):
        use_small_splits(patch)
        shutil.copytree(base_run, folder / "one")
        assert export.main(["one", "out", *FAST]) == 0
    return folder / "out"


def read(path) -> tuple[dict, dict]:
    """(metadata, tensors) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


# ---- a run


def test_the_files_hold_what_llama_cpp_reads(exported, base_run):
    assert {path.name for path in exported.iterdir()} == {
        "README.md", "Modelfile", "class_names.json", "mmproj.gguf", "model.gguf",
    }  # fmt: skip
    facts, tensors = read(exported / "mmproj.gguf")
    assert facts["clip.projector_type"] == "mlp" and facts["clip.vision.feature_layer"] == [2]
    assert (facts["clip.vision.image_size"], facts["clip.vision.patch_size"]) == (70, 14)
    assert facts["clip.vision.image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert tensors["v.position_embd.weight"].shape.tolist() == [96, 26] and "v.post_ln.weight" not in tensors
    facts, tensors = read(exported / "model.gguf")
    assert facts["general.architecture"] == "llama" and facts["tokenizer.ggml.add_bos_token"] is True
    assert len(tensors) == 3 + 3 * 9 and tensors["blk.2.attn_q.weight"].shape.tolist() == [96, 96]
    assert len(facts["tokenizer.ggml.tokens"]) == tensors["token_embd.weight"].shape[1]
    classes = json.loads((exported / "class_names.json").read_text())
    assert classes["runtime"] == runtime_versions() and classes["quantize"] == "f16" and classes["is_rolled"] is True


def test_the_readme_says_what_was_verified_and_its_code_runs(exported, tmp_path, monkeypatch, capsys):
    text = (exported / "README.md").read_text()
    versions = runtime_versions()
    assert (
        f"Classified by llama.cpp {versions['llama.cpp']} (cyllama {versions['cyllama']}) on the CPU, no flash "
        "attention: the same text" in text
    )
    (logits,) = re.findall(r"logits within (0\.\d+)%", text)
    assert float(logits) < 0.1  # 0.13 beside fp16, 0.15 with flash attention
    assert re.search(r"the same class as plain transformers for \d+ of 20 images, top-1 0\.\d+ and 0\.\d+ \(p = ", text)
    assert "the first patch, in the upper left corner, stays unseen" in text and "library_name: gguf" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (file,) = synthetic_images(tmp_path, [(84, 60)])
    copy = shutil.copytree(exported, tmp_path / "copy")
    monkeypatch.chdir(copy)
    names: dict = {}
    exec(code.replace("photo.jpg", file), names)
    prompt = json.loads((exported / "class_names.json").read_text())["prompt"]
    assert names["text"] == prompt.replace("<image>", "<__media__>") and names["image"].size == (70, 70)
    assert capsys.readouterr().out.count("\n") == 1 and (copy / "square.png").exists()


def test_the_modelfile_has_template_and_question(exported):
    lines = (exported / "Modelfile").read_text()
    assert lines.startswith("FROM ./model.gguf\nFROM ./mmproj.gguf\n") and 'PARAMETER stop "</s>"\n' in lines
    assert f'TEMPLATE """[INST] {{{{ .Prompt }}}}<image_newline>\n{QUESTION} [/INST]"""\n' in lines
    assert gguf_export.render("Modelfile.j2", before="{{", after='"""', eos="", eos_id=0).count('"""') == 2


def test_a_chat_template_of_the_file_makes_an_image_the_prompt(exported):
    import jinja2

    template = read(exported / "model.gguf")[0]["tokenizer.chat_template"]
    messages = [{"role": "user", "content": "<image>"}]
    prompt = json.loads((exported / "class_names.json").read_text())["prompt"]
    assert jinja2.Template(template, keep_trailing_newline=True).render(messages=messages) == prompt


@pytest.mark.parametrize(("quantize", "bits"), [("q8_0", 8.6), ("q4_k_m", 6.2)])
def test_smaller_files_are_verified_too(quantize, bits, exported, trained, here, capsys):
    status, output = run(capsys, "one", "out", "--quantize", quantize, "--limit", "4", *FAST)
    assert status == 0 and "of 4 images, top-1" in output and "llama_context" not in output
    _, whole = read(exported / "model.gguf")
    _, tensors = read(here / "out" / "model.gguf")
    weights = sum(tensor.n_elements for tensor in whole.values())
    assert sum(int(tensor.n_bytes) for tensor in tensors.values()) * 8 / weights < bits
    assert json.loads((here / "out" / "class_names.json").read_text())["quantize"] == quantize


# ---- what must not be exported


def test_a_runtime_without_the_defect_gets_the_table_as_it_is(trained, here, monkeypatch, capsys):
    """Such a runtime gives what transformers computes from the file with the table as it is."""
    measured, tables = [], []
    measure, write = gguf_export._measure_reference, gguf_export.write_vision
    monkeypatch.setattr(gguf_export, "_measure_reference", lambda *args: measured.append(measure(*args)) or measured[0])
    monkeypatch.setattr(gguf_export, "write_vision", lambda *args: tables.append(args[-1]) or write(*args))
    images: dict[str, int] = {}  # by their ids, in the order of the reference

    def give(kind: str):
        return lambda _, batch: getattr(measured[0], kind)[False][images.setdefault(batch.samples[0].id, len(images))]

    monkeypatch.setattr(LlamaCpp, "embed", give("features"))
    monkeypatch.setattr(LlamaCpp, "logits", give("logits"))
    status, output = run(capsys, "one", "out", "--limit", "2", *FAST)
    assert status == 0 and tables == [True, False] and "image embeddings within 0.00%, logits within 0.00%" in output
    assert json.loads((here / "out" / "class_names.json").read_text())["is_rolled"] is False
    assert "computes CLIP towers as transformers does" in (here / "out" / "README.md").read_text()


def other_embeddings(monkeypatch):
    real = LlamaCpp.embed
    monkeypatch.setattr(LlamaCpp, "embed", lambda runtime, batch: real(runtime, batch) * 1.1)


def other_tokens(monkeypatch):
    real = LlamaCpp.read_prompt

    def read_prompt(runtime, batch):
        chunks, ids = real(runtime, batch)
        return chunks, ids[:-1]

    monkeypatch.setattr(LlamaCpp, "read_prompt", read_prompt)


def unpermuted_heads(monkeypatch):
    monkeypatch.setattr(files, "interleave", lambda weight, heads: weight)


def other_answers(monkeypatch):
    def predict(model, rows):
        return {f"{n}": (0 if isinstance(model, PlantModel) else 1, 0) for n in range(20)}

    monkeypatch.setattr("evaluation.verify.predict_classes", predict)


def lost_file(monkeypatch):
    monkeypatch.setattr(gguf_export, "write_vision", lambda merged, path, rolled: path.write_bytes(b"GGUF"))


def lost_place(monkeypatch):
    monkeypatch.setattr(files, "PROJECTOR", {"linear_1": "mm.0"})


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (other_embeddings, "computes other image embeddings than transformers (with the position table as it is "),
        (other_tokens, "makes other tokens of the prompt than the run's tokenizer; nothing was exported, leave out"),
        (unpermuted_heads, "llama.cpp computes another model: the same text tokens, image embeddings within 0.0"),
        (other_answers, "llama.cpp classifies worse: the same class as plain transformers for 0 of 20 images"),
        (lost_file, "mmproj.gguf: llama.cpp refuses ("),
        (lost_place, "weights have no place in a GGUF file (multi_modal_projector.linear_2."),
    ],
)
def test_nothing_is_exported_that_llama_cpp_computes_otherwise(break_it, sentence, trained, here, monkeypatch, capsys):
    break_it(monkeypatch)
    status, output = run(capsys, "one", "out", "--limit", "2", *FAST)
    assert status == 1 and sentence in output and "Traceback" not in output
    assert not (here / "out").exists() and not (here / "out.draft").exists()


# ---- other tokenizers and language models


def spm_tokenizer(texts, scheme: str) -> PreTrainedTokenizerFast:
    """As Mistral's and Vicuna's: spaces are letters, other characters fall back to bytes; no sentencepiece file."""
    tokenizer = Tokenizer(tokenizer_models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    )
    saved = json.loads(tokenizer.to_str())
    saved["pre_tokenizer"]["split"] = False
    saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", extra_special_tokens={"image_token": "<image>"}, **names
    )


@pytest.fixture
def families(checkpoint, tmp_path):
    """families(name): a checkpoint of that family; "spm ...": of Mistral's with a tokenizer as Mistral's."""

    def make(family: str) -> str:
        if not family.startswith("spm"):
            return checkpoint(family)
        processor = LlavaNextProcessor.from_pretrained(checkpoint("mistral"), backend="pil")
        processor.tokenizer = spm_tokenizer([*SPECIES, QUESTION, "[INST] \n [/INST] \u00e9t\u00e9"], family[4:])
        processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
        folder = tmp_path / "spm"
        build_tiny_model(processor, 0).save_pretrained(folder)
        processor.save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize("family", ["spm always", "spm first", "spm never", "vicuna", "llama3"])
def test_other_tokenizers_and_prompts(family, families, here, small_splits, capsys):
    argv = [*TINY, "--model", families(family), "--views", "base", "--trainable", "everything", "--max-steps", "2"]
    assert train.main([*argv, "--output-dir", "run"]) == 0
    status, output = run(capsys, "run", "out", "--limit", "2", *FAST)
    assert status == 0 and "the same text tokens" in output, output
    facts, _ = read(here / "out" / "model.gguf")
    assert facts["tokenizer.ggml.model"] == ("llama" if "spm" in family else "gpt2")


def test_what_llama_cpp_has_no_equal_for_is_refused(checkpoint, here, small_splits, capsys):
    argv = [*TINY, "--model", checkpoint("chatml"), "--views", "base", "--trainable", "everything"]
    assert train.main([*argv, "--max-steps", "2", "--output-dir", "run"]) == 0
    status, output = run(capsys, "run", "out", *FAST)
    assert status == 1 and "its language model is qwen2, not llama or mistral; leave it out" in output


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text_config": {"hidden_act": "gelu"}}, "its activation is gelu, not silu"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "its vision tower is siglip_vision_model, not"),
        ({"vision_config": {"hidden_act": "relu"}}, "its vision tower's activation is relu, not quick_gelu or gelu"),
        ({"projector_hidden_act": "relu"}, "its projector's activation is relu, not gelu"),
        ({"vision_feature_layer": [-2, -1]}, "its number of feature layers is 2, not 1"),
        ({"vision_feature_select_strategy": "full"}, "its vision_feature_select_strategy is full, not default"),
        ({"vision_feature_layer": [-2]}, None),
    ],
)
def test_each_obstacle_is_found(change, sentence, tiny):
    fields = build_config(tiny.processor, SIZES["tiny"]).to_dict()
    for key, value in change.items():
        fields[key] = fields[key] | value if isinstance(value, dict) else value
    found = files.find_gguf_obstacle(LlavaNextConfig.from_dict(fields))
    assert found is None if sentence is None else found.startswith(sentence)

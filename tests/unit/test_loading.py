"""Checkpoints as people and the hub have them: whole, with gaps, torn, quantized, and a hub that fails."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlavaNextForConditionalGeneration

from config.training_config import TrainingConfig
from data.synthetic import SPECIES
from evaluation import verify
from models import builder, loading
from models.builder import build_model, build_processor
from models.checks import check_model
from tests.conftest import FAMILIES
from tests.fake_hub import FakeHub
from utils.logging_utils import UserError

CPU = torch.device("cpu")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A checkpoint to corrupt."""
    return shutil.copytree(checkpoint(), tmp_path / "model")


def load(model: Path | str, load_in_4bit: bool = True, precision: str = "no", **settings):
    config = TrainingConfig(model=str(model), image_size=70, load_in_4bit=load_in_4bit, **settings)
    processor, prompt = build_processor(config, list(SPECIES))
    loaded = build_model(config, processor, CPU, precision)
    check_model(loaded, processor, prompt, load_in_4bit, config.trainable, precision)
    return loaded


def refusal(model: Path | str, *args, **settings) -> str:
    """The sentence, which has a next move, stays on one line, and is short."""
    with pytest.raises(UserError) as refused:
        load(model, *args, **settings)
    sentence = str(refused.value)
    assert "\n" not in sentence and len(sentence) < 700 and str(model) in sentence
    assert any(move in sentence for move in ("use ", "download ", "run ", "check ", "give ", "try ", "set ", "choose "))
    return sentence


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def split(folder: Path) -> None:
    """The weights in three files with an index."""
    tensors, place = load_file(folder / WEIGHTS), {}
    for number in range(3):
        part = {name: tensors[name] for name in sorted(tensors)[number::3]}
        save_file(part, folder / f"model-{number}.safetensors", {"format": "pt"})
        place |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))


# ---- each weight of the model is from the files


def drop(pattern: str):
    def change(tensors: dict) -> None:
        for name in [name for name in tensors if pattern in name]:
            del tensors[name]

    return change


def rename(tensors: dict) -> None:
    for name in list(tensors):
        tensors[f"student.{name}"] = tensors.pop(name)


def widen(pattern: str):
    def change(tensors: dict) -> None:
        name = next(name for name in tensors if pattern in name)
        tensors[name] = torch.cat([tensors[name]] * 2)

    return change


def add_other(tensors: dict) -> None:
    tensors["language_model.draft_head.weight"] = torch.zeros(2, 2)


def to_integers(tensors: dict) -> None:
    tensors.update({name: tensor.to(torch.int8) for name, tensor in tensors.items() if "gate_proj" in name})


def spoil(pattern: str, value: float):
    def change(tensors: dict) -> None:
        next(tensor for name, tensor in tensors.items() if pattern in name).view(-1)[3] = value

    return change


GAPS = [
    (drop("vision_tower"), "are missing .*vision_tower"),
    (drop("layers.1."), r"are missing .*layers\.1\."),
    (drop("lm_head"), "1 are missing .*lm_head"),
    (drop("image_newline"), "1 are missing .*image_newline"),
    (rename, "are missing .*have no place in the model .*student"),
    (widen("linear_1.bias"), r"linear_1.bias: \[192\] in place of \[96\]"),
    (widen("gate_proj"), r"gate_proj.weight: \[576, 96\] in place of \[288, 96\]"),
    (widen("embed_tokens"), "1 have another shape .*embed_tokens"),
    (add_other, "1 have no place in the model .*draft_head"),
    (to_integers, "3 are no floating-point numbers .*gate_proj"),
    (spoil("gate_proj", float("nan")), "gate_proj.weight is not finite"),
    (spoil("vision_tower", float("inf")), "vision_tower.* is not finite"),
]


@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize(("change", "words"), GAPS)
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(change, words, load_in_4bit, folder, capfd):
    edit_weights(folder, change)
    assert re.search(words, refusal(folder, load_in_4bit))
    assert "MISSING" not in capfd.readouterr().err  # nor the table of transformers


def test_weights_of_a_run_and_of_an_export_are_checked_alike(folder):
    model = load(folder, load_in_4bit=False, trainable="everything")
    edit_weights(folder, drop("layers.1."))
    for read in (lambda: builder.load_weights(model, folder), lambda: verify.load_whole(folder, torch.float32, CPU)):
        with pytest.raises(UserError, match=rf"{folder}.* are missing .*layers\.1\."):
            read()


def test_a_model_of_which_a_part_is_offloaded_computes_what_the_whole_one_does(folder, tmp_path):
    """As an export that is larger than its GPU: what accelerate offloads is on "meta" until a forward needs it."""
    places = {"device_map": {"model": "cpu", "lm_head": "disk"}, "offload_folder": str(tmp_path)}
    offloaded, whole = (loading.load_model(folder, "x", torch.bfloat16, place) for place in (places, {}))
    ids = torch.tensor([[1, 2, 3]])
    assert offloaded.lm_head.weight.is_meta and offloaded.lm_head.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(offloaded(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_weights_read_into_one_buffer_are_those_of_the_file(folder):
    """As a GPU takes them that holds the model in 4 bit."""
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | {"as it was": torch.ones(3, dtype=torch.int64)}, weights)
    tensors, expected = loading.read_tensors(folder, "x"), load_file(weights)
    loading.share_buffer(tensors.values())
    for name, tensor in tensors.items():
        assert torch.equal(tensor[...], expected[name]) and (tensor.buffer is None) == (name == "as it was")
    first = min(
        (tensor for tensor in tensors.values() if tensor.buffer is not None), key=lambda tensor: tensor.place[1]
    )
    os.truncate(weights, first.place[1] + 1)
    with pytest.raises(OSError, match="the file ends"):
        first[...]
    assert "the file ends before the tensor does" in first.problems[0]


def test_a_cpu_keeps_what_it_reads_so_there_is_no_common_buffer(folder, monkeypatch):
    monkeypatch.setattr(loading, "share_buffer", None)
    for load_in_4bit in (True, False):
        assert load(folder, load_in_4bit, "no")
    assert verify.load_whole(folder, torch.float32, CPU, in_4bit=True)


def test_weights_that_fp16_cannot_hold_are_refused(folder):
    edit_weights(folder, spoil("gate_proj", 1e6))
    for load_in_4bit in (True, False):
        assert "bf16" in refusal(folder, load_in_4bit, "fp16")
        assert load(folder, load_in_4bit, "bf16")


def test_a_head_that_the_config_ties_may_lack(folder):
    edit_weights(folder, drop("lm_head"))
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    model = builder.unwrap(load(folder, load_in_4bit=False))
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_any_floating_type_are_read(dtype, folder):
    edit_weights(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    saved = load_file(folder / WEIGHTS)
    name = next(name for name in saved if name.endswith("lm_head.weight"))
    for load_in_4bit in (True, False):
        assert torch.equal(builder.unwrap(load(folder, load_in_4bit)).lm_head.weight, saved[name].float())


def test_a_config_of_more_layers_than_the_files_have_weights_is_not_built(folder):
    edit_json(folder / "config.json", lambda config: config["text_config"].update(num_hidden_layers=10**9))
    assert "74 of them for 1000000002 layers" in refusal(folder)


# ---- files


def no_shard(folder: Path) -> None:
    (folder / "model-1.safetensors").unlink()


def empty_shard(folder: Path) -> None:
    (folder / "model-1.safetensors").write_bytes(b"")


def short_shard(folder: Path) -> None:
    path = folder / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def pointer(folder: Path, name: str = "model-1.safetensors") -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def pointer_of_tokenizer(folder: Path) -> None:
    pointer(folder, "tokenizer.json")


def odd_activation(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config["text_config"].update(hidden_act="unheard-of"))


def pickle_shard(folder: Path) -> None:
    torch.save({}, folder / "model-1.safetensors")


def torn_index(folder: Path) -> None:
    (folder / INDEX).write_text((folder / INDEX).read_text()[:99])


def list_index(folder: Path) -> None:
    (folder / INDEX).write_text("[1]")


def empty_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {}}')


def outside_index(folder: Path) -> None:
    edit_json(folder / INDEX, lambda found: found["weight_map"].update(x="../model-1.safetensors"))


def short_index(folder: Path) -> None:
    edit_json(
        folder / INDEX, lambda found: [found["weight_map"].pop(name) for name in sorted(found["weight_map"])[1::3]]
    )


def no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def same_tensor_twice(folder: Path) -> None:
    tensors = load_file(folder / "model-0.safetensors")
    save_file(tensors | load_file(folder / "model-1.safetensors"), folder / "model-1.safetensors", {"format": "pt"})


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def no_such_layer(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(vision_feature_layer=-50))


def no_such_family(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config["text_config"].update(model_type="gpt2"))


def two_channels(folder: Path) -> None:
    edit_json(folder / "processor_config.json", lambda found: found["image_processor"].update(image_mean=[0, 0]))


def other_tile(folder: Path) -> None:
    edit_json(
        folder / "processor_config.json", lambda found: found["image_processor"].update(size={"shortest_edge": 56})
    )


def false_quantization(folder: Path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=settings))


def no_json_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def nested_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def other_processor(folder: Path) -> None:
    edit_json(folder / "processor_config.json", lambda found: found.update(processor_class="CLIPProcessor"))
    edit_json(folder / "tokenizer_config.json", lambda found: found.update(processor_class="CLIPProcessor"))


def torn_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": ')


def unknown_stop(folder: Path) -> None:
    edit_json(folder / "generation_config.json", lambda found: found.update(eos_token_id=10**6))


def other_image_token(folder: Path) -> None:
    edit_json(folder / "config.json", lambda found: found.update(image_token_index=7))


CORRUPTIONS = [
    (no_shard, "model-1.safetensors is not there; download or copy it again"),
    (empty_shard, "model-1.safetensors is corrupted"),
    (short_shard, "model-1.safetensors is corrupted"),
    (pickle_shard, "model-1.safetensors is corrupted"),
    (pointer, "model-1.safetensors is a git-LFS pointer: run git lfs pull"),
    (pointer_of_tokenizer, "tokenizer.json is a git-LFS pointer: run git lfs pull"),
    (odd_activation, "its config cannot be loaded"),
    (torn_index, f"{INDEX} is no index of weights"),
    (list_index, f"{INDEX} is no index of weights"),
    (empty_index, f"{INDEX} is no index of weights"),
    (outside_index, f"{INDEX} is no index of weights"),
    (short_index, "are missing"),
    (no_index, f"holds no {WEIGHTS} and no {INDEX}"),
    (no_json_config, "its config cannot be loaded"),
    (list_config, "its config cannot be loaded"),
    (nested_config, "its config cannot be loaded"),
    (same_tensor_twice, "is in two of its files"),
    (adapter_beside, "holds a LoRA adapter (adapter_config.json), which would not be loaded; give its base model"),
    (no_such_layer, "features of vision layer -50 cannot be computed"),
    (no_such_family, "are missing"),
    (two_channels, "its processor cannot be loaded"),
    (other_tile, r"tiles of \[56, 70\] pixels are the vision tower's 70"),
    (false_quantization, "0 are in 4 bit"),
    (torn_generation_config, "its generation config cannot be loaded"),
    (unknown_stop, "eos_token_id 1000000 is none of the tokenizer's"),
    (other_image_token, "is the model's 7"),
]


def test_weights_in_three_files_are_loaded(folder):
    split(folder)
    assert load(folder)


@pytest.mark.parametrize(("corrupt", "words"), CORRUPTIONS)
def test_a_corrupted_file_is_reported(corrupt, words, folder):
    split(folder)
    corrupt(folder)
    if words.startswith(("eos_token_id", "is the model's", "tiles")):  # of the model as a whole, not of a file
        with pytest.raises(UserError, match=words):
            load(folder)
    else:
        assert words in refusal(folder)


def test_a_processor_of_another_kind_is_reported(folder):
    other_processor(folder)
    assert "CLIPProcessor" in refusal(folder)


def test_a_checkpoint_without_a_generation_config_stops_where_its_config_says(folder):
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", lambda config: config.update(eos_token_id=None))
    model = builder.unwrap(load(folder))
    assert model.generation_config.eos_token_id == model.config.text_config.eos_token_id is not None


def test_settings_of_generation_that_cannot_be_saved_are_not_kept(folder, tmp_path):
    """transformers refuses to write a temperature without sampling, and would do so at the first checkpoint."""
    edit_json(folder / "generation_config.json", lambda found: found.update(temperature=0.2, top_p=0.6))
    load(folder, load_in_4bit=False, trainable="everything").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "generation_config.json").exists()


def test_a_tokenizer_without_a_padding_token_pads_with_its_eos(folder):
    edit_json(folder / "tokenizer_config.json", lambda found: found.pop("pad_token"))
    processor, prompt = build_processor(TrainingConfig(model=str(folder)), list(SPECIES))
    assert processor.tokenizer.pad_token == prompt.eos and load(folder)


def test_an_attention_kernel_of_an_untrusted_config_is_not_fetched(folder):
    kernel = {"attn_implementation": "owner/kernel", "_attn_implementation": "owner/kernel"}
    parts = ("text_config", "vision_config")
    edit_json(
        folder / "config.json", lambda config: [config.update(kernel), *(config[part].update(kernel) for part in parts)]
    )
    assert builder.unwrap(load(folder)).model.language_model.config._attn_implementation == "sdpa"


# ---- quantized already


def quantize(folder: Path, **settings) -> None:
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": builder.IN_16_BIT}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16, **how | settings)
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float16, quantization_config=config)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder)


def test_a_checkpoint_in_nf4_loads_as_it_is(folder, checkpoint):
    quantize(folder)
    model = builder.unwrap(load(folder, precision="bf16"))
    whole = builder.unwrap(load(checkpoint(), precision="bf16"))
    for loaded, made in zip(model.parameters(), whole.parameters(), strict=True):
        assert loaded.dtype == made.dtype and (loaded.is_floating_point() or (loaded == made).float().mean() > 0.95)
    assert model.model.language_model.layers[0].mlp.up_proj.base_layer.compute_dtype == torch.bfloat16
    assert "is already quantized (bitsandbytes, 4-bit nf4)" in refusal(folder, load_in_4bit=False)


def test_a_gap_in_a_checkpoint_in_nf4_is_reported(folder):
    quantize(folder)
    edit_weights(folder, drop("layers.1."))
    assert "are missing" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: quantize(folder, bnb_4bit_quant_type="fp4"),
        lambda folder: quantize(folder, bnb_4bit_use_double_quant=False),
        lambda folder: quantize(folder, llm_int8_skip_modules=["lm_head"]),
    ],
    ids=["fp4", "single", "tower"],
)
def test_a_checkpoint_in_another_4_bit_is_refused(change, folder):
    change(folder)
    with pytest.raises(UserError):
        load(folder)


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "compressed-tensors", "unheard-of"])
@pytest.mark.parametrize("part", ["whole", "text_config"])
def test_a_checkpoint_of_another_quantization_is_refused(method, part, folder):
    settings = {"quant_method": method, "bits": 4}
    edit_json(
        folder / "config.json",
        lambda config: (config if part == "whole" else config[part]).update(quantization_config=settings),
    )
    for load_in_4bit in (True, False):
        assert f"is already quantized ({method}" in refusal(folder, load_in_4bit)


# ---- the hub


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    served = FakeHub(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between retries
    with served.serving():
        yield served


def for_path(part: str, answer: Callable[[], httpx.Response]) -> Callable:
    return lambda request: answer() if part in request.url.path else None


def test_a_checkpoint_of_the_hub_is_downloaded_once(hub, checkpoint):
    base = builder.unwrap(load("owner/model"))
    assert base.config._commit_hash == hub.commit and base.name_or_path == "owner/model"
    asked = len(hub.requests)
    assert load("owner/model", model_revision=hub.commit)  # a run's own commit
    assert len(hub.requests) == asked


def test_a_cache_that_holds_it_is_enough(hub, monkeypatch):
    load("owner/model")
    hub.fail = lambda request: hub.refuse(503)
    assert load("owner/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load("owner/model")
    next((Path(constants.HF_HUB_CACHE)).rglob(WEIGHTS)).unlink()
    assert "is not whole in the cache, and HF_HUB_OFFLINE is set" in refusal("owner/model")


@pytest.mark.parametrize("is_split", [False, True])
def test_weights_are_cached_once_all_of_them_are(is_split, hub, folder):
    if is_split:
        split(folder)
    default = TrainingConfig().model_revision
    assert not loading.is_cached("owner/model", hub.commit)
    loading.find_checkpoint("owner/model", hub.commit)  # an index too
    assert not loading.is_cached("owner/model", hub.commit)
    loading.find_checkpoint("owner/model", hub.commit, with_weights=True)  # by its commit: no branch is known
    assert loading.is_cached("owner/model", hub.commit) and not loading.is_cached("owner/model", default)
    loading.find_checkpoint("owner/model", default)
    assert loading.is_cached("owner/model", default)
    next(Path(constants.HF_HUB_CACHE).rglob("model*.safetensors")).unlink()
    assert not loading.is_cached("owner/model", hub.commit)


def test_only_what_is_not_there_is_optional(hub, folder):
    hub.fail = for_path("generation_config", lambda: hub.refuse(503))
    assert "the hub answers 503 for /owner/model/resolve" in refusal("owner/model")
    hub.fail = lambda request: None
    (folder / "generation_config.json").unlink()
    hub.commit = "d" * 40
    assert load("owner/model")


def lost() -> httpx.Response:
    raise httpx.ConnectError("[Errno -2] Name or service not known")


def broken_off() -> httpx.Response:
    raise httpx.RemoteProtocolError("peer closed connection without sending complete message body")


def full() -> httpx.Response:
    raise OSError(errno.ENOSPC, "No space left on device")


FAULTS = [
    ("/api", lost, "the hub cannot be reached .*; check the network"),
    ("/api", lambda: FakeHub.refuse(None, 401, "GatedRepo"), "check that HF_TOKEN"),
    ("/resolve", lambda: FakeHub.refuse(None, 403, "GatedRepo"), "is gated .*accept its terms"),
    ("/api", lambda: FakeHub.refuse(None, 404, "RepoNotFound"), "not on the hub .*check the name"),
    ("/api", lambda: FakeHub.refuse(None, 404, "RevisionNotFound"), "has no revision .*check --model-revision"),
    ("/api", lambda: FakeHub.refuse(None, 429), "the hub answers 429 .*try again later"),
    ("/api", lambda: FakeHub.refuse(None, 500), "the hub answers 500 .*try again later"),
    ("/tree", lambda: FakeHub.refuse(None, 502), "the hub answers 502 .*try again later"),
    (WEIGHTS, lambda: FakeHub.refuse(None, 503), f"the hub answers 503 for .*{WEIGHTS}; try again later"),
    (WEIGHTS, broken_off, "its download broke off .*run the same command again"),
    (WEIGHTS, full, "cannot be put in the cache, HF_HOME .*No space left on device.*free space"),
    ("/api", lambda: httpx.Response(200, text="<html>Please log in to this network</html>"), "broke off"),
]


@pytest.mark.parametrize(("path", "answer", "words"), FAULTS)
def test_a_fault_of_the_hub_is_reported(path, answer, words, hub):
    hub.fail = for_path(path, answer)
    assert re.search(words, refusal("owner/model"))


def test_a_corrupted_file_of_the_cache_can_be_mended_as_it_says(hub):
    load("owner/model")
    cached = next(Path(constants.HF_HUB_CACHE).rglob(WEIGHTS))
    cached.resolve().write_bytes(cached.read_bytes()[:-5])
    found = re.search("is corrupted .*; delete (.*) and run the same command again", refusal("owner/model"))
    shutil.rmtree(found[1])
    assert load("owner/model")


def test_a_fault_that_passes_is_waited_out(hub):
    faults = [broken_off, lost, lambda: hub.refuse(500), lambda: hub.refuse(429)]
    for number, fault in enumerate(faults):
        hub.commit, left = f"{number}" * 40, [fault, fault]
        hub.fail = lambda request, left=left: left.pop()() if left else None
        assert load("owner/model") and not left


def test_pickles_on_the_hub_get_the_sentence_of_a_folder(hub, folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert f"holds no {WEIGHTS}" in refusal("owner/model") and "pytorch_model.bin" not in " ".join(hub.requests)


@pytest.mark.parametrize("place", ["/proc/1/cache", "/dev/null/cache"])
def test_a_cache_that_cannot_be_written_is_reported(place, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", place)
    assert "cannot be put in the cache, HF_HOME" in refusal("owner/model")


def test_a_repository_that_moved_is_followed(hub):
    def moved(request: httpx.Request) -> httpx.Response | None:
        if "old/name" in request.url.path:
            return httpx.Response(307, headers={"Location": str(request.url).replace("old/name", "owner/model")})
        return None

    hub.fail = moved
    assert load("old/name")


def test_the_default_model_has_its_commit_and_others_their_current_one(hub):
    default = TrainingConfig()
    assert len(default.model_revision) == 40
    with pytest.raises(UserError):
        loading.find_checkpoint(default.model, default.model_revision)
    assert default.model_revision in " ".join(hub.requests)
    loading.find_checkpoint("owner/model", default.model_revision)
    asked = [path for path in hub.requests if "owner/model" in path]
    assert not [path for path in asked if default.model_revision in path]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_whole(family, checkpoint):
    assert load(checkpoint(family)) and load(checkpoint(family), load_in_4bit=False)

"""Processor, base model, adapter and the assertions on what was loaded."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from config.training_config import TrainingConfig
from data.collator import PlantCollator
from data.synthetic import SPECIES
from models import builder, loading
from models.builder import build_model, build_processor, check_model, set_trainable, unwrap
from models.fused_layers import get_fused_layers
from tests.conftest import FAMILIES
from utils.logging_utils import UserError

CPU = torch.device("cpu")
NAMES = list(SPECIES)


def built(folder: str, precision: str = "no", **settings):
    """(model, processor, prompt, config) of a checkpoint folder, as train.py builds them."""
    config = TrainingConfig(model=folder, image_size=70, **settings)
    processor, prompt = build_processor(config, NAMES)
    return build_model(config, processor, CPU, precision), processor, prompt, config


def checked(folder: str, precision: str = "no", **settings) -> list[str]:
    model, processor, prompt, config = built(folder, precision, **settings)
    return check_model(model, processor, prompt, config.load_in_4bit, config.trainable, precision)


# ---- what is asserted after load


@pytest.mark.parametrize("trainable", ["adapter", "adapter+projector", "projector"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_four_bit_model_passes_its_assertions(trainable, precision, checkpoint):
    found = checked(checkpoint(), precision, trainable=trainable)
    assert "21 linears in 4 bit, only in the language model" in found
    assert "LoRA sits on 21 language-model projections, nowhere else" in found
    assert any(f"({trainable}), no others" in sentence for sentence in found)


def test_sixteen_bit_and_everything(checkpoint):
    assert "0 linears in 4 bit, only in the language model" in checked(checkpoint(), "bf16", load_in_4bit=False)
    found = checked(checkpoint(), trainable="everything", load_in_4bit=False)
    assert "LoRA sits on 0 language-model projections, nowhere else" in found


def break_adapter_place(model, processor):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(unwrap(model), LoraConfig(target_modules=["q_proj"]))  # a leaf name: CLIP has it too


def break_precision(model, processor):
    unwrap(model).model.vision_tower.float()


def break_trainables(model, processor):
    unwrap(model).model.image_newline.requires_grad_(True)


def break_dtype_of_trainables(model, processor):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def break_patch(model, processor):
    processor.patch_size = 7


def break_pinpoints(model, processor):
    processor.image_processor.image_grid_pinpoints = [[70, 140]]


def break_image_token(model, processor):
    unwrap(model).config.image_token_id = 9


def break_stop(model, processor):
    unwrap(model).generation_config.eos_token_id = [9]


def break_vocabulary(model, processor):
    processor.tokenizer.add_tokens(["a new word"])


BREAKS = [
    (break_adapter_place, "LoRA sits on"),
    (break_precision, "CLIPVisionModel is kept in torch.bfloat16"),
    (break_trainables, "image_newline"),
    (break_dtype_of_trainables, "trainable parameters are fp32"),
    (break_patch, "patches of 7 pixels are the vision tower's 14"),
    (break_pinpoints, "pinpoints are the model's"),
    (break_image_token, "is the model's 9"),
    (break_stop, "generation stops at '</s>'"),
    (break_vocabulary, "tokens have an embedding of"),
]


@pytest.mark.parametrize(("change", "words"), BREAKS)
def test_a_model_that_is_not_what_was_asked_for_is_refused(change, words, checkpoint):
    model, processor, prompt, config = built(checkpoint(), "bf16", load_in_4bit=False)
    model = change(model, processor) or model
    with pytest.raises(UserError) as refused:
        check_model(model, processor, prompt, config.load_in_4bit, config.trainable, "bf16")
    assert words in str(refused.value)


def test_a_vision_tower_in_four_bit_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(
        builder, "IN_16_BIT", ["vision_tower", "multi_modal_projector", "lm_head"]
    )  # the short names do nothing
    with pytest.raises(UserError, match="linears in 4 bit, only in the language model"):
        checked(checkpoint())


# ---- trainable and frozen parameters


def steps(model, processor, collator_of, count=2, rate=0.05):
    """`count` optimizer steps on one batch; returns the names of the parameters that moved."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = collator_of(processor)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=rate)
    model.train()
    losses = []
    for _ in range(count):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}, losses


@pytest.fixture
def batch_of(tiny):
    from data.collator import PlantCollator

    def make(prompt):
        def collate(processor):
            batch = PlantCollator(processor, prompt, NAMES, 70)(tiny.rows(4))
            names = ("input_ids", "pixel_values", "image_sizes", "logits_to_keep", "shift_labels", "labels")
            return {name: batch[name] for name in names}

        return collate

    return make


@pytest.mark.parametrize(
    ("trainable", "parts"),
    [
        ("adapter", {"lora_A", "lora_B"}),
        ("projector", {"modules_to_save"}),
        ("adapter+projector", {"lora_A", "lora_B", "modules_to_save"}),
    ],
)
def test_two_steps_on_a_four_bit_base_move_only_trainable_parameters(trainable, parts, checkpoint, batch_of):
    model, processor, prompt, _ = built(checkpoint(), trainable=trainable)
    trainable_parameters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    moved, losses = steps(model, processor, batch_of(prompt))
    assert moved == trainable_parameters and losses[1] < losses[0]
    assert {part for part in ("lora_A", "lora_B", "modules_to_save") if any(part in name for name in moved)} == parts


def test_the_frozen_tower_runs_without_autograd(checkpoint, batch_of):
    model, processor, prompt, _ = built(checkpoint())
    outputs = []
    unwrap(model).model.vision_tower.register_forward_hook(lambda module, args, output: outputs.append(output))
    model.train()
    model(**batch_of(prompt)(processor))
    assert outputs and all(not state.requires_grad for state in outputs[0].hidden_states)


@pytest.mark.parametrize("is_fused", [True, False])
def test_recomputing_activations_changes_no_gradient(is_fused, checkpoint, batch_of, monkeypatch):
    monkeypatch.setattr("models.fused_layers.MIN_ROWS", 1)
    monkeypatch.setattr("models.fused_layers.find_obstacle", lambda layer: "" if is_fused else "not asked for")
    gradients = []
    for recompute in ("false", "true", "offload"):
        torch.manual_seed(0)
        model, processor, prompt, _ = built(checkpoint(), gradient_checkpointing=recompute)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.train()
        model(**batch_of(prompt)(processor), use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        layers = unwrap(model).model.language_model.layers
        assert len(get_fused_layers(layers)) == (len(layers) if is_fused else 0)
        recomputes = [not layer.forward.keep if is_fused else layer.gradient_checkpointing for layer in layers]
        assert recomputes == [recompute != "false"] * len(layers)
    for other_gradients in gradients[1:]:
        assert len(gradients[0]) == len(other_gradients) == 42
        assert all(torch.allclose(expected, found, atol=1e-6) for expected, found in zip(gradients[0], other_gradients))


def test_the_last_layer_computes_the_rows_whose_logits_are_kept(checkpoint, batch_of, monkeypatch):
    monkeypatch.setattr("models.fused_layers.MIN_ROWS", 1)
    model, processor, prompt, _ = built(checkpoint())
    down_proj, rows = get_fused_layers(unwrap(model).model.language_model.layers)[-1].groups[3], []
    monkeypatch.setattr(down_proj, "forward", lambda x, real=down_proj.forward: rows.append(len(x)) or real(x))
    batch = batch_of(prompt)(processor) | {"use_cache": False}  # as in training; with a cache the stock layer computes
    kept = batch["logits_to_keep"]
    model.train()(**batch)
    unlabeled = {name: value for name, value in batch.items() if "labels" not in name}
    whole = model(**unlabeled | {"logits_to_keep": 0}).logits
    assert rows == [4 * len(kept), batch["input_ids"].numel()]
    torch.testing.assert_close(model(**unlabeled).logits, whole[:, kept], atol=1e-4, rtol=0)


def test_dropout_and_whole_models_keep_the_stock_layers(checkpoint):
    for settings in ({"lora_dropout": 0.1}, {"trainable": "everything", "load_in_4bit": False}):
        model, *_ = built(checkpoint(), **settings)
        assert not get_fused_layers(unwrap(model).model.language_model.layers)


def test_weights_are_read_and_not_mapped(checkpoint, monkeypatch):
    """Mapped files would stay resident while a 15 GB checkpoint is loaded."""
    opened = []
    real = loading.safe_open

    def record(*args, backend, **kwargs):
        opened.append(backend)
        return real(*args, backend=backend, **kwargs)

    monkeypatch.setattr(loading, "safe_open", record)
    built(checkpoint())
    assert opened == ["pread"]


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_random_weights_of_the_full_shape_pass_the_assertions(load_in_4bit, monkeypatch, tiny):
    """Two layers of it, a sixteenth as wide."""
    real = builder.build_config

    def small(processor, size):
        config = real(processor, size)
        for part, heads in ((config.text_config, 8), (config.vision_config, 4)):
            part.hidden_size, part.intermediate_size, part.num_hidden_layers = 256, 512, 2
            part.num_attention_heads = heads
        config.text_config.num_key_value_heads = 2
        config.text_config.head_dim = 32
        return config

    monkeypatch.setattr(builder, "build_config", small)
    config = TrainingConfig(model="full", load_in_4bit=load_in_4bit)
    processor, prompt = build_processor(config, NAMES)
    model = build_model(config, processor, CPU, "no")
    found = check_model(model, processor, prompt, load_in_4bit, config.trainable, "no")
    assert any("14 linears in 4 bit" in sentence for sentence in found) == load_in_4bit
    assert not [name for name, part in [*model.named_parameters(), *model.named_buffers()] if part.is_meta]
    collator = PlantCollator(processor, prompt, NAMES, 336)
    batch = collator(tiny.rows(1))
    assert batch.samples[0].image_tokens == 1176
    assert torch.isfinite(model(**batch.split(1)[0]).loss)


def test_an_evaluation_between_steps_loses_no_gradient(checkpoint, batch_of):
    """On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights in the first evaluation."""
    model, processor, prompt, _ = built(checkpoint(), "bf16")
    batch = batch_of(prompt)(processor)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name
    )


def test_everything_leaves_out_what_gets_no_gradient(tiny, batch_of):
    model = set_trainable(tiny.model(), "everything", 1, 1, 0.0)
    model(**batch_of(tiny.prompt)(tiny.processor)).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


# ---- a test per family of templates


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_trains_two_steps_and_generation_stops_at_its_eos(family, checkpoint, batch_of, tiny):
    model, processor, prompt, config = built(checkpoint(family))
    check_model(model, processor, prompt, config.load_in_4bit, config.trainable, "no")
    moved, losses = steps(model, processor, batch_of(prompt))
    assert len(moved) == 42 and losses[1] < losses[0]
    from data.collator import PlantCollator

    batch = PlantCollator(processor, prompt, NAMES, 70).prompts(tiny.rows(2))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes")}

    def length_when_it_says(token: int) -> int:
        hook = unwrap(model).lm_head.register_forward_hook(
            lambda module, args, output: output.index_fill(-1, torch.tensor([token]), 1e4)
        )
        model.eval()
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id)
        hook.remove()
        return ids.shape[1] - inputs["input_ids"].shape[1]

    assert (length_when_it_says(prompt.eos_id), length_when_it_says(9)) == (1, 6)


def test_trained_labels_end_in_eos(checkpoint, batch_of):
    for family in FAMILIES:
        config = TrainingConfig(model=checkpoint(family), image_size=70)
        processor, prompt = build_processor(config, NAMES)
        labels = batch_of(prompt)(processor)["shift_labels"]
        assert all(row[row != -100][-1] == prompt.eos_id for row in labels)


# ---- checkpoints that cannot be used


def copy_of(checkpoint, tmp_path):
    return shutil.copytree(checkpoint(), tmp_path / "model")


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def other_kind(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"model_type": "llava_next"', '"model_type": "llava"'))


def no_config(folder):
    (folder / "config.json").unlink()


def torn_weights(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("corrupt", "words"),
    [
        (without_weights, "holds no model.safetensors"),
        (other_kind, "is a llava checkpoint; use a llava_next one"),
        (no_config, "its config cannot be loaded"),
        (torn_weights, "model.safetensors is corrupted"),
        (no_tokenizer, "its processor cannot be loaded"),
    ],
)
def test_a_folder_that_is_no_checkpoint(corrupt, words, checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    corrupt(folder)
    with pytest.raises(UserError) as refused:
        built(str(folder))
    assert words in str(refused.value) and str(folder) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("model", "words"), [("llava-hf/llava-v1.6-mistral-7b-hf", "HF_HUB_OFFLINE is set")])
def test_a_model_that_is_not_there(model, words):
    with pytest.raises(UserError, match=words):
        build_processor(TrainingConfig(model=model), NAMES)


@pytest.mark.parametrize("model", ["tiny", None])
@pytest.mark.parametrize(
    ("question", "name", "words"),
    [
        ("What is <image> this?", "oak", "--question 'What is <image> this.': holds <image>, a special token of"),
        ("What is it?", "oak</s>", "class name 'oak</s>': holds </s>, a special token .*; leave it out"),
    ],
)
def test_special_tokens_in_the_words_of_a_user_are_refused(question, name, words, model, checkpoint):
    config = TrainingConfig(model=model or str(checkpoint("mistral")), question=question)
    with pytest.raises(UserError, match=words):
        build_processor(config, ["ash", name])


def test_old_processors_on_the_hub_are_completed(checkpoint, tmp_path):
    import json

    folder = copy_of(checkpoint, tmp_path)
    settings = json.loads((folder / "processor_config.json").read_text())
    for name in ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"):
        del settings[name]
    (folder / "processor_config.json").write_text(json.dumps(settings))
    assert checked(str(folder))


def test_nothing_is_unpickled(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    without_weights(folder)
    with pytest.raises(UserError, match="holds no"):
        built(str(folder))


def test_sharded_weights_load(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    from transformers import LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained(folder)
    without_weights(folder)
    model.save_pretrained(folder, max_shard_size="1MB")
    assert checked(str(folder))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_whole_model_is_not_rounded_on_its_way(precision, checkpoint, tiny):
    model, processor, prompt, _ = built(checkpoint(), precision, trainable="everything", load_in_4bit=False)
    saved = load_file(f"{checkpoint()}/model.safetensors")
    name = next(name for name in saved if name.endswith("q_proj.weight") and "language_model" in name)
    assert torch.equal(model.model.language_model.layers[0].self_attn.q_proj.weight, saved[name])
    check_model(model, processor, prompt, False, "everything", precision)
    made = build_model(tiny.config, tiny.processor, CPU, precision)
    assert torch.equal(made.lm_head.weight, tiny.model(tiny.config.seed).lm_head.weight)


# ---- trained weights, saved and loaded


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"trainable": "adapter+projector"},
        {"trainable": "projector"},
        {"trainable": "everything", "load_in_4bit": False},
    ],
    ids=str,
)
def test_weights_come_back_as_they_were_saved(settings, checkpoint, batch_of, tmp_path):
    model, processor, prompt, _ = built(checkpoint(), **settings)
    batch = batch_of(prompt)(processor)
    before = model.eval()(**batch).logits
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
    moved = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = built(checkpoint(), **settings)[0].eval()
    builder.load_weights(again, tmp_path)
    assert torch.equal(again(**batch).logits, moved) and not torch.allclose(before, moved, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name: name.replace("q_proj", "qq_proj"), "6 weights are missing .*6 have no place"),
        (lambda name: None if "layers.1" in name else name, "14 weights are missing .*0 have no place"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(change, words, checkpoint, tmp_path):
    model = built(checkpoint())[0]
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items() if change(name)}, path)
    with pytest.raises(UserError, match=f"the adapter does not fit the model: {words}"):
        builder.load_weights(built(checkpoint())[0], tmp_path)


@pytest.mark.parametrize("model", ["tiny", "full", "a checkpoint"])
def test_a_gpu_that_is_too_small_is_reported(model, checkpoint, tiny, monkeypatch):
    def fill(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(builder, "build_tiny_model", fill)
    monkeypatch.setattr(builder, "build_random_model", fill)
    monkeypatch.setattr(builder.LlavaNextForConditionalGeneration, "from_pretrained", fill)
    with pytest.raises(UserError, match="does not fit the GPU's memory; use --load-in-4bit true"):
        built(checkpoint() if model == "a checkpoint" else model)

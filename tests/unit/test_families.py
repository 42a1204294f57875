"""Checkpoints of every family: language models, vision towers, and what of them cannot be used."""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from transformers import GenerationConfig, LlavaNextForConditionalGeneration

from data.collator import PlantCollator
from models import merging
from models.builder import PlantModel
from models.checks import check_model
from models.loading import load_model
from models.tiny import SIZES, build_config, build_tiny_processor
from models.trainable import lora_settings
from tests.conftest import FAMILIES
from tests.unit.test_builder import CPU, NAMES, built, steps
from tests.unit.test_collator import rows_of
from utils.image_utils import count_image_tokens
from utils.logging_utils import UserError

TOWER = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=70, patch_size=14)
TOWER |= dict(intermediate_size=64)


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """save(vision=..., text=..., field=value, ...) is the folder of a tiny checkpoint with these parts and fields."""

    def make(vision=None, text=None, **fields) -> str:
        folder, processor = tmp_path_factory.mktemp("model"), build_tiny_processor(NAMES, SIZES["tiny"])
        config = build_config(processor, SIZES["tiny"])
        ids = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if text:
            shape = {"vocab_size": len(processor.tokenizer), "head_dim": 12} | SIZES["tiny"].text
            config.text_config = getattr(transformers, text[0])(**shape | ids | text[1])
        if vision:
            config.vision_config = getattr(transformers, vision[0])(**TOWER | vision[1])
        for name, value in fields.items():
            setattr(config, name, value)
        torch.manual_seed(0)
        model = LlavaNextForConditionalGeneration(config)
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return str(folder)

    return make


def batch_of(processor, prompt, rows) -> dict:
    (batch,) = PlantCollator(processor, prompt, NAMES, 70)(rows).split(len(rows))
    return batch


# ---- from training to plain transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_exported_and_computes_what_was_trained(family, checkpoint, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("models.fused_layers.MIN_ROWS", 1)
    model, processor, prompt, config = built(checkpoint(family), load_in_4bit=False, lora_r=4)
    steps(model, processor, lambda processor: batch_of(processor, prompt, tiny.rows(4)))
    plant = PlantModel(model, processor, prompt, PlantCollator(processor, prompt, NAMES, 70), "no", CPU)
    assert len(plant.fused) == 3
    batch, best, out = batch_of(processor, prompt, rows_of(tiny, [(40, 90)])), tmp_path / "best", tmp_path / "out"
    ((scored, _),) = plant.score(tiny.rows(2))
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    model.save_pretrained(best)
    out.mkdir()
    adapter = merging.read_adapter(best, lora_settings("adapter", 4, config.lora_alpha, config.lora_dropout))
    merging.merge_into(base := Path(checkpoint(family)), adapter, out, torch.float32)
    merging.save_settings(base, processor, prompt, torch.float32, out)
    plain = LlavaNextForConditionalGeneration.from_pretrained(out).eval()
    scaling = getattr(plain.config.text_config, "logits_scaling", 1.0)  # transformers leaves Granite's out
    with torch.no_grad():
        assert (plain(**batch).logits / scaling - expected).abs().max() < 1e-4
    again = dataclasses.replace(plant, model=load_model(out, "out", torch.float32, {}))
    ((scored_again, _),) = again.score(tiny.rows(2))
    for (_, ours), (_, theirs) in zip(scored, scored_again):
        assert ours == pytest.approx(theirs, abs=1e-3)


# ---- language models


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, settings",
    [
        ("Granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}),
        ("Cohere", {"logit_scale": 0.0625}),
        ("Gemma2", {"final_logit_softcapping": 3.0}),
    ],
)
def test_logits_are_those_of_the_language_models_own_class(kind, settings, save):
    """transformers' LLaVA-NeXT takes the language model without what its own class does behind the head."""
    model = load_model(Path(save(text=(f"{kind}Config", settings))), "it", torch.float32, {})
    causal = getattr(transformers, f"{kind}ForCausalLM")(model.config.text_config).eval()
    causal.model, causal.lm_head.weight = model.model.language_model, model.lm_head.weight
    ids = torch.arange(5, 25)[None]
    assert torch.equal(model(input_ids=ids).logits, causal(ids).logits)


@pytest.mark.parametrize("kind", ["Qwen3", "Gemma", "Olmo2"])
def test_layers_that_are_not_fused_compute_by_themselves_and_the_log_says_so(kind, save, tiny, monkeypatch):
    monkeypatch.setattr("models.fused_layers.MIN_ROWS", 1)
    model, processor, prompt, _ = built(save(text=(f"{kind}Config", {})))
    plant = PlantModel(model, processor, prompt, PlantCollator(processor, prompt, NAMES, 70), "no", CPU)
    assert f"| 0 fused layers ({kind}DecoderLayer computes otherwise) |" in plant.describe("adapter", True)
    moved, losses = steps(model, processor, lambda processor: batch_of(processor, prompt, tiny.rows(4)))
    assert len(moved) == 42 and losses[1] < losses[0]


# ---- vision towers


TOWERS = {
    "SigLIP": (("SiglipVisionConfig", {}), "full", [-4, -2]),
    "SigLIP without its pooling head": (("SiglipVisionConfig", {"vision_use_head": False}), "full", [1, 2]),
    "DINOv2": (("Dinov2Config", {}), "default", -2),
    "DINOv3 without register tokens": (("DINOv3ViTConfig", {"num_register_tokens": 0}), "default", -1),
    "ViT": (("ViTConfig", {}), "default", 2),
    "AIMv2": (("Aimv2VisionConfig", {}), "full", -1),
    "BEiT, without a table of positions": (("BeitConfig", {}), "default", -1),
    "CLIP, two layers": (None, "default", [-2, 0]),
}


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_is_trained_up_to_its_last_feature_layer(tower, save, tiny):
    vision, strategy, layers = TOWERS[tower]
    folder = save(vision=vision, vision_feature_select_strategy=strategy, vision_feature_layer=layers)
    model, processor, prompt, _ = built(folder, load_in_4bit=False, trainable="everything")
    assert check_model(model, processor, prompt, False, "everything", "no")
    model(**batch_of(processor, prompt, tiny.rows(2))).loss.backward()
    frozen = {name for name, part in model.named_parameters() if not part.requires_grad}
    assert frozen == {name for name, part in model.named_parameters() if part.grad is None}
    assert layers == -1 or any(".layer" in name for name in frozen)


# ---- what cannot be used


@pytest.mark.parametrize(
    "parts, words",
    [
        (
            {"text": ("Phi3Config", {"pad_token_id": 0})},
            "its language model (phi3) has 6 of the 21 linears that LoRA is attached to (q_proj, ",
        ),
        ({"text": ("GPTNeoXConfig", {})}, "its language model (gpt_neox) has 0 of the 21 linears"),
        (
            {"vision": ("Dinov2WithRegistersConfig", {})},
            "features of vision layer -1 cannot be computed by its tower, dinov2_with_registers (RuntimeError: shape",
        ),
        ({"vision": ("SiglipVisionConfig", {})}, "a tile must be 25 patches, and a CLS if vision_feature_select_strat"),
        ({"vision_feature_select_strategy": "full"}, "features of vision layer -1 cannot be computed by its tower"),
        (
            {"vision": ("InternVLVisionConfig", {"image_size": [70, 70], "patch_size": [14, 14]})},
            "its vision tower (internvl_vision) has patches of [14, 14], and LLaVA-NeXT needs square ones",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(parts, words, save):
    with pytest.raises(UserError) as refused:
        built(save(**parts))
    assert words in str(refused.value) and "; use a" in str(refused.value)


# ---- Granite Vision's tiles


@torch.no_grad()
def test_the_image_tokens_of_granite_vision_are_counted_as_the_model_counts_them(checkpoint):
    """27 pinpoints of 384 pixels, of which 27 patches of 14 pixels leave a rest; images of many shapes."""
    model = load_model(Path(checkpoint("granite")), "it", torch.float32, {}).model
    pinpoints = [[384 * high, 384 * wide] for high in range(1, 11) for wide in range(1, 11) if high * wide <= 10]
    model.config.image_grid_pinpoints = pinpoints
    model.config.vision_config.image_size = 384
    generator = torch.Generator().manual_seed(0)
    for size in [(384, 384), (1, 3000), (3000, 1), *torch.randint(20, 3000, (60, 2), generator=generator).tolist()]:
        tokens, tiles = count_image_tokens(tuple(size), pinpoints, 384, 14)
        features = [torch.empty(tiles, 27 * 27, 1)]
        packed, _ = model.pack_image_features(features, torch.tensor([size]), "full", torch.empty(1))
        assert len(packed[0]) == tokens

"""The base view alone: what the model sees of an image, and the same as a LLaVA-1.5."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    SiglipVisionConfig,
)

import models.merging as merging
from config.training_config import TrainingConfig
from data.collator import PlantCollator
from data.oxford_flowers import CLASS_NAMES
from models.base_view import NEWLINE, build_llava_processor, find_unused_token, save_newline_token, select_views
from models.builder import build_processor
from models.checks import check_model
from models.tiny import build_config, build_tiny_model
from tests.conftest import FAMILIES, QUESTION
from tests.unit.test_collator import SIZES, Tampered, rows_of
from utils.image_utils import BASE_VIEW, count_image_tokens, open_image
from utils.logging_utils import UserError

PATCHES = 25  # of 14 x 14 in a tile of 70 x 70


@pytest.fixture(scope="module")
def base(tiny):
    """The tiny preset's collator with images at their own sizes, and its model."""
    processor, prompt = build_processor(replace(tiny.config, views="base"), tiny.names)
    return PlantCollator(processor, prompt, tiny.names, None), build_tiny_model(processor, 0).eval()


def test_images_of_any_size_are_one_tile_and_as_many_tokens(tiny, base):
    collator, _ = base
    rows = rows_of(tiny, SIZES)
    batch = collator(rows)
    assert batch["pixel_values"].shape == (4, 1, 3, 70, 70)
    assert [(sample.image_tokens, sample.tiles) for sample in batch.samples] == [(PATCHES + 1, 1)] * 4
    image_tokens = batch["input_ids"] == collator.processor.image_token_id
    assert image_tokens.sum(dim=1).tolist() == [PATCHES + 1] * 4
    assert batch["input_ids"].shape[1] == max(sample.length for sample in batch.samples)
    for row, pixels in zip(rows, [collator([row])["pixel_values"] for row in rows]):  # bit for bit the first tile
        assert torch.equal(pixels[:, :1], tiny.native([row])["pixel_values"][:, :1])
    assert collator.batch_bytes(4) == 4 * 3 * 70 * 70 * 4 and collator.prompts(rows)["image_sizes"].shape == (4, 2)
    assert collator([collator.largest_row(rows)]).samples[0].image_tokens == PATCHES + 1  # what memory is planned for


@torch.no_grad()
def test_features_are_those_of_anyres_before_its_tiles_and_the_newline(tiny, base):
    collator, model = base
    other = tiny.model()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), other.parameters()))
    row = rows_of(tiny, [(40, 90)])
    ours, theirs = collator(row), tiny.native(row)
    (found,) = model.model.get_image_features(ours["pixel_values"], ours["image_sizes"]).pooler_output
    (anyres,) = other.model.get_image_features(theirs["pixel_values"], theirs["image_sizes"]).pooler_output
    assert len(found) == PATCHES + 1 < len(anyres)
    assert (found[:PATCHES] - anyres[:PATCHES]).abs().max() < 1e-5 and torch.equal(found[-1], other.model.image_newline)


@torch.no_grad()
def test_a_batch_of_mixed_sizes_scores_as_each_image_alone(tiny, base):
    collator, model = base
    batch = collator([row | {"label": 3} for row in rows_of(tiny, SIZES)])
    (together,) = batch.split(4)
    assert together["input_ids"].unique(dim=0).shape[0] == 1  # the images alone differ, nothing is padded
    alone = torch.cat([model(**micro_batch).logits for micro_batch in batch.split(1)])
    assert (model(**together).logits - alone).abs().max() < 1e-4


def test_a_wrong_number_of_tokens_is_refused_by_the_sample(tiny, base):
    collator, _ = base
    for change in (-1, 1):
        processor = copy.copy(collator.processor)
        processor.num_additional_image_tokens += change
        wrong = PlantCollator(processor, collator.prompt, tiny.names, 70)
        with pytest.raises(UserError, match=f"sample .*: {26 + change} image tokens, expected 26, one for each"):
            wrong(tiny.rows(2))

    def drop_pixels(encoded):
        del encoded["pixel_values"]

    with pytest.raises(UserError, match="image_sizes is missing|pixel_values is missing"):
        PlantCollator(Tampered(collator.processor, drop_pixels), collator.prompt, tiny.names, 70)(tiny.rows(2))


def test_counts():
    assert count_image_tokens((336, 336), BASE_VIEW, 336, 14) == (577, 1)
    assert count_image_tokens((9, 4000), BASE_VIEW, 336, 14) == (577, 1)
    assert count_image_tokens((9, 4000), [], 336, 14) == (576, 1)  # LLaVA-1.5


def test_model_and_processor_must_see_the_same(base, tiny):
    collator, model = base
    prompt = collator.prompt
    sentences = check_model(model, collator.processor, prompt, False, "everything", "no")
    assert "a tile is 25 patches + 1 CLS, the vision tower has [26]" in sentences
    with pytest.raises(UserError, match="pinpoints are the model's"):
        check_model(tiny.model(), collator.processor, prompt, False, "everything", "no")


# ---- LLaVA-1.5


def test_its_images_of_any_size_are_as_many_tokens(base, tiny):
    """An export is scored with its own processor, which has no pinpoints to choose from."""
    collator, _ = base
    processor, prompt = build_llava_processor(collator.processor, collator.prompt, tiny.config.question)
    llava = PlantCollator(processor, prompt, tiny.names, None)
    assert llava.pinpoints == [] and llava.batch_bytes(4) == collator.batch_bytes(4)
    assert {sample.prompt_length for sample in llava(rows_of(tiny, SIZES)).samples} == {llava.most_prompt_tokens()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_of_a_llava_has_the_newline_behind_the_image(family, checkpoint, tmp_path):
    config = TrainingConfig(model=checkpoint(family), views="base")
    processor, prompt = build_processor(config, CLASS_NAMES)
    llava, llava_prompt = build_llava_processor(processor, prompt, QUESTION)
    assert NEWLINE not in processor.chat_template + prompt.prompt  # what it was made from stays
    merging.save_processor(llava, tmp_path)
    save_newline_token(tmp_path, llava)
    llava, (unused, newline) = AutoProcessor.from_pretrained(tmp_path), find_unused_token(processor.tokenizer)
    before, after = processor.tokenizer.get_vocab(), llava.tokenizer.get_vocab()
    assert before.pop(unused) == after.pop(NEWLINE) == newline and before == after
    image = processor.image_token_id
    for name in CLASS_NAMES[:20]:
        ids = processor.tokenizer(prompt.text(name)).input_ids
        at = ids.index(image) + 1
        assert llava.tokenizer(llava_prompt.text(name)).input_ids == [*ids[:at], newline, *ids[at:]]


def test_a_chat_template_that_hides_the_image_token_is_refused(base):
    collator, _ = base
    processor = copy.deepcopy(collator.processor)
    processor.chat_template = processor.chat_template.replace("<image>", "{{ '<im' + 'age>' }}")
    with pytest.raises(UserError, match="does not spell <image>, behind which <image_newline> has to stand; use "):
        build_llava_processor(processor, collator.prompt, QUESTION)


def spare_rows(config):
    config.text_config.vocab_size += 3


def tied_head(config):
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True


def several_layers(config):
    config.vision_feature_layer = [-2, -1]


def without_cls(config):
    config.vision_config = SiglipVisionConfig(
        image_size=70, patch_size=14, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2,
        vision_use_head=False,
    )  # fmt: skip
    config.vision_feature_select_strategy = "full"


def as_it_is(config):
    pass


@torch.no_grad()
@pytest.mark.parametrize("change", [as_it_is, spare_rows, tied_head, several_layers, without_cls])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_llava_computes_the_same(change, renamed, tiny, tmp_path, monkeypatch):
    """The weights of a LLaVA-NeXT that sees base views, written as a LLaVA-1.5 and loaded by plain transformers."""
    processor = copy.copy(tiny.processor)
    processor.image_processor = copy.copy(processor.image_processor)
    if change is without_cls:
        processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    processor = select_views(processor, "base")
    config = build_config(processor, tiny_size())
    change(config)
    torch.manual_seed(1)
    model = LlavaNextForConditionalGeneration(config).eval()
    (tmp_path / "next").mkdir()
    model.save_pretrained(tmp_path / "next")
    if renamed:
        rename(tmp_path / "next" / "model.safetensors")
    monkeypatch.setattr(merging, "SHARD_BYTES", 300_000)
    llava, prompt = build_llava_processor(processor, tiny.prompt, tiny.config.question)
    (tmp_path / "out").mkdir()
    merging.save_settings(tmp_path / "next", llava, prompt, torch.float32, tmp_path / "out")
    merging.merge_into(tmp_path / "next", None, tmp_path / "out", torch.float32, llava)
    found, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and found.config.model_type == "llava"
    rows = rows_of(tiny, SIZES)
    images, collator = [open_image(row["image"]) for row in rows], PlantCollator(processor, tiny.prompt, tiny.names, 70)
    ours = [model(**collator([row]).split(1)[0]).logits[0] for row in rows]
    loaded = AutoProcessor.from_pretrained(tmp_path / "out")
    for image, row, expected in zip(images, rows, ours):
        image = image.resize((70, 70), 3)
        inputs = loaded(images=[image], text=[prompt.text(tiny.names[row["label"]])], return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
        logits = found.eval()(**inputs).logits[0, -len(expected) - 1 : -1]
        assert logits.shape == expected.shape and (logits - expected).abs().max() < 1e-5
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["architectures"] == ["LlavaForConditionalGeneration"] and "image_grid_pinpoints" not in settings


def tiny_size():
    from models.tiny import SIZES

    return SIZES["tiny"]


def rename(path):
    """From names as the hub's checkpoints have them to those of the model in memory."""
    pairs = {"language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head"}
    pairs |= {part: f"model.{part}" for part in ("vision_tower", "multi_modal_projector", "image_newline")}
    weights = {}
    for name, weight in load_file(path).items():
        old = next(old for old in pairs if name.startswith(old))
        weights[name.replace(old, pairs[old], 1)] = weight
    save_file(weights, path, {"format": "pt"})

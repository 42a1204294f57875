"""Scores of the token trie against each class name scored alone, and generation."""

import copy
import os

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoProcessor

from config.training_config import TrainingConfig
from data.collator import PlantCollator
from data.dataset import ROW
from data.oxford_flowers import CLASS_NAMES
from models.builder import PlantModel, build_base, build_processor, set_trainable
from models.features import decode, encode, features_schema, scale_to_unit
from models.fused_layers import fuse_layers
from models.memory import MicroBatcher
from models.scoring import score_batch
from models.trie import build_tries
from runtime.distributed import Distributed
from tests.conftest import FLOWERS
from tests.unit.test_collator import SIZES, rows_of
from utils.logging_utils import UserError, setup_logging
from utils.tokenizer_utils import build_prompt

CPU = torch.device("cpu")
MISTRAL = FLOWERS.parent / "processor"


def one_by_one(model, collator, row) -> torch.Tensor:
    """(C,) the same by the stock forward pass, one image and one name at a time, without padding, trie or cache."""
    scores = []
    for label in range(len(collator.class_names)):
        batch = collator([row | {"label": label}])
        sample = batch.samples[0]
        logits = model(
            input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], image_sizes=batch["image_sizes"]
        ).logits[0]
        logs = logits.log_softmax(dim=-1)
        places = range(sample.prompt_length, sample.length)
        scores.append(sum(logs[place - 1, batch["input_ids"][0, place]] for place in places))
    return torch.stack(scores).float()


@pytest.fixture(scope="module")
def flowers(checkpoint):
    """collator(names) over the processor of a checkpoint, images at their own sizes; and its model."""

    def make(names, family="mistral", load_in_4bit=False):
        config = TrainingConfig(model=checkpoint(family), load_in_4bit=load_in_4bit)
        processor, prompt = build_processor(config, names)
        return PlantCollator(processor, prompt, names, None), build_base(config, processor, CPU, torch.float32).eval()

    return make


NAMES = ["rose", "rose mallow", "rosemary", "ash", "a", "oxeye daisy", "mallow rose", "moon orchid"]  # prefixes too


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family, load_in_4bit", [("mistral", False), ("llama3", False), ("mistral", True)])
def test_trie_scores_are_the_scores_of_each_name_alone(tiny, flowers, attention, family, load_in_4bit):
    collator, model = flowers(NAMES, family, load_in_4bit=load_in_4bit)
    model.set_attn_implementation(attention)
    rows = rows_of(tiny, SIZES)
    batch = collator(rows)
    assert len({sample.prompt_length for sample in batch.samples}) > 1
    scores = score_batch(model, batch, build_tries(collator.name_ids), MicroBatcher(len(rows)))
    by_id = {row["id"]: row for row in rows}
    expected = torch.stack([one_by_one(model, collator, by_id[sample.id]) for sample in batch.samples])
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0)
    assert (expected.max(dim=1).values - expected.min(dim=1).values > 1).all()


def test_scores_do_not_depend_on_micro_batch_or_number_of_tries(tiny, flowers):
    collator, model = flowers(NAMES)
    batch = collator(rows_of(tiny, SIZES))
    names = collator.name_ids
    whole = score_batch(model, batch, build_tries(names), MicroBatcher(8))
    for size, nodes in ((1, 512), (3, 512), (8, 1), (8, 7)):
        tries = build_tries(names, nodes)
        assert len(tries) > 1 or nodes == 512
        split = score_batch(model, batch, tries, MicroBatcher(size))
        torch.testing.assert_close(split, whole, atol=1e-4, rtol=0)
        assert torch.equal(split.argsort(dim=1), whole.argsort(dim=1))


def test_the_loss_follows_from_the_scores(tiny, flowers):
    """-log p of the true name, summed and divided by its tokens, is the loss of the stock forward."""
    collator, model = flowers(NAMES)
    batch = collator(rows_of(tiny, SIZES))
    scores = score_batch(model, batch, build_tries(collator.name_ids), MicroBatcher(4))
    tokens = sum(sample.length - sample.prompt_length for sample in batch.samples)
    labels = torch.tensor([sample.label for sample in batch.samples])
    loss = -scores[torch.arange(len(labels)), labels].sum() / tokens
    (micro_batch,) = batch.split(len(labels))
    torch.testing.assert_close(loss, model(**micro_batch).loss, atol=1e-5, rtol=0)


@pytest.mark.skipif(not MISTRAL.exists(), reason=f"the Mistral tokenizer is not in {MISTRAL}")
def test_the_102_names_make_one_trie_of_the_known_size():
    """Counted beforehand for this tokenizer: 495 tokens in 480 nodes, 378 of them inner."""
    processor = AutoProcessor.from_pretrained(MISTRAL, backend="pil")
    prompt = build_prompt(processor, TrainingConfig.question, [processor.tokenizer.eos_token_id])
    (trie,) = build_tries(PlantCollator(processor, prompt, CLASS_NAMES, 336).name_ids)
    assert (trie.counts[1:].sum(), len(trie.tokens) - 1, trie.is_inner.sum() - 1) == (495, 480, 378)


def test_ten_thousand_names_fit_in_bounded_memory(tiny):
    """Tries of at most 512 inner nodes, whose logits exist 1,024 rows at a time; each name is in one of them."""
    names = [[7 + index % 90, 7 + index // 90, 2] for index in range(10_000)]
    tries = build_tries(names)
    assert max(trie.is_inner.sum() - 1 for trie in tries) <= 512 and len(tries) > 10
    assert sorted(name for trie in tries for name in trie.names if name >= 0) == list(range(10_000))
    batch = tiny.collator(tiny.rows(1))
    scores = score_batch(tiny.model().eval(), batch, tries, MicroBatcher(1))
    some = [0, 4_321, 9_999]
    alone = score_batch(tiny.model().eval(), batch, build_tries([names[index] for index in some]), MicroBatcher(1))
    torch.testing.assert_close(scores[:, some], alone, atol=1e-4, rtol=0)


def test_a_name_of_one_token_needs_no_second_forward(tiny):
    (trie,) = build_tries([[5], [6]])
    scores = score_batch(tiny.model().eval(), tiny.collator(tiny.rows(3)), [trie], MicroBatcher(2))
    assert trie.is_inner.tolist() == [True, False, False] and scores.shape == (3, 2) and (scores < 0).all()


def test_what_cannot_be_scored_is_refused(tiny):
    with pytest.raises(UserError, match="the same tokens"):
        build_tries([[5, 2], [5, 2]])
    model = copy.deepcopy(tiny.model())
    model.config.text_config.sliding_window = 32
    with pytest.raises(UserError, match="attends to 32 tokens only and prompt with name has"):
        score_batch(model, tiny.collator(tiny.rows(1)), build_tries(tiny.collator.name_ids), MicroBatcher(1))


def test_a_score_that_is_no_number_is_refused(tiny):
    model = tiny.model().eval()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="a score is not a finite number; .*test-00000"):
        score_batch(model, tiny.collator(tiny.rows(1)), build_tries(tiny.collator.name_ids), MicroBatcher(1))


@torch.no_grad()
def test_an_adapter_and_sixteen_bits_are_scored_too(tiny, flowers):
    collator, base = flowers(NAMES, load_in_4bit=True)
    model = set_trainable(base, "adapter", 4, 8, 0.0).eval()
    rows = rows_of(tiny, SIZES)
    batch, tries = collator(rows), build_tries(collator.name_ids)
    before = score_batch(model, batch, tries, MicroBatcher(4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.05)
    scores = score_batch(model, batch, tries, MicroBatcher(4))
    by_id = {row["id"]: row for row in rows}
    expected = torch.stack([one_by_one(model, collator, by_id[sample.id]) for sample in batch.samples])
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0)
    assert (scores - before).abs().max() > 0.01
    with model.disable_adapter():
        torch.testing.assert_close(score_batch(model, batch, tries, MicroBatcher(4)), before)
    with torch.autocast("cpu", torch.bfloat16):
        rough = score_batch(model, batch, tries, MicroBatcher(4))
    assert (rough - expected).abs().max() < 0.5 and torch.equal(rough.argmax(dim=1), expected.argmax(dim=1))


def test_fused_layers_give_the_same_scores(tiny, flowers, monkeypatch):
    monkeypatch.setattr("models.fused_layers.MIN_ROWS", 1)
    collator, base = flowers(NAMES, load_in_4bit=True)
    model = set_trainable(base, "adapter", 4, 8, 0.0).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    batch, tries = collator(rows_of(tiny, SIZES)), build_tries(collator.name_ids, 7)
    stock = score_batch(model, batch, tries, MicroBatcher(4))
    down_proj, rows = fuse_layers(base.model.language_model.layers)[-1].groups[3], []
    monkeypatch.setattr(down_proj, "forward", lambda x, real=down_proj.forward: rows.append(len(x)) or real(x))
    torch.testing.assert_close(score_batch(model, batch, tries, MicroBatcher(4)), stock, atol=1e-4, rtol=0)
    ends = {at for sample in batch.samples for at in (sample.prompt_length - 2, sample.prompt_length - 1)}
    assert rows[0] == len(ends) * len(batch.samples)  # of the prompts the last alone; after them come the names


def test_out_of_memory_halves_the_micro_batch_until_one_image_does_not_fit(tiny, flowers, capsys, monkeypatch):
    monkeypatch.setattr("models.scoring.collect_memory", lambda device: None)  # seconds, and a CPU has none to free
    setup_logging()
    collator, model = flowers(NAMES)
    batch, tries = collator(rows_of(tiny, SIZES)), build_tries(collator.name_ids)
    expected = score_batch(model, batch, tries, MicroBatcher(4))
    room = 1

    def refuse(module, args, kwargs):
        if len(kwargs["input_ids"]) > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    micro_batcher = MicroBatcher(4)
    torch.testing.assert_close(score_batch(model, batch, tries, micro_batcher), expected, atol=1e-4, rtol=0)
    assert micro_batcher.size == 1 and "retrying with micro-batch 1" in capsys.readouterr().out
    room = 0
    with pytest.raises(UserError, match="out of memory scoring one image; use --load-in-4bit true"):
        score_batch(model, batch, tries, micro_batcher)
    micro_batcher.size = micro_batcher.smallest = 4  # with sharded weights
    with pytest.raises(
        UserError, match="scoring a micro-batch of 4; use --per-device-eval-batch-size 2, --load-in-4bit"
    ):
        score_batch(model, batch, tries, micro_batcher)


def plant_of(tiny, **loading):
    return PlantModel(tiny.model(), tiny.processor, tiny.prompt, tiny.collator, "no", torch.device("cpu"), **loading)


class Mirrored(Distributed):
    """The first of two ranks, whose other one finds the same and is done a batch earlier."""

    def gather_object(self, items):
        self.gathered = getattr(self, "gathered", 0) + 1
        return [*items, *(items if self.gathered < 3 else [None])]


def test_features_do_not_depend_on_whether_names_are_scored(tiny):
    plant, rows = plant_of(tiny), Dataset.from_list(tiny.rows(3), features=ROW)
    ((whole, _),), ((part, _),) = (list(plant.score(rows, True, with_names)) for with_names in (True, False))
    for (sample, found), (_, alone) in zip(whole, part, strict=True):
        assert len(found.scores) == len(plant.class_names) and alone.scores == [], sample.id
        assert np.array_equal(found.state, alone.state) and np.array_equal(found.tower, alone.tower)


def test_batches_of_all_ranks_come_at_once(tiny):
    """One exchange for each, however many ranks: after each batch a training asks all of them whether to stop.

    No id that an image can have is taken for that of the row which is computed for other ranks' sake.
    """
    plant, dist = plant_of(tiny, eval_batch_size=2), Mirrored(0, 2)
    first, *others = tiny.rows(11)
    rows = Dataset.from_list([first | {"id": "largest"}, *others], features=ROW)
    batches = list(plant.distribute(plant.score, rows, dist))
    assert [len(found) for found, _ in batches] == [4, 4, 2] and dist.gathered == 4


def test_unreadable_images_are_skipped_and_reported(tiny):
    listed = tiny.rows(5)
    listed[2] = listed[2] | {"image": {"bytes": b"", "path": "gone.jpg"}}
    batches = list(plant_of(tiny, eval_batch_size=2).score(Dataset.from_list(listed, features=ROW)))
    scores = [found for scores, _ in batches for found in scores]
    assert sorted(sample.id for sample, _ in scores) == [row["id"] for index, row in enumerate(listed) if index != 2]
    assert all(len(values) == len(tiny.names) for _, values in scores)
    assert [unreadable for _, unreadable in batches] == [[], [f"{listed[2]['id']}: gone.jpg: is empty (0 bytes)"], []]


@pytest.mark.parametrize("unreadable", [(), (1, 2), (2, 3), (0, 1, 2, 3, 4, 5)])
def test_ranks_that_share_weights_make_as_many_forwards_whatever_can_be_read(unreadable, tiny, monkeypatch):
    """Each forward fetches weights from all ranks. Here two images fit at a time where six were asked for."""
    monkeypatch.setattr("models.builder.is_sharded", lambda base: True)
    monkeypatch.setattr("models.builder.scoring_micro_batch", lambda *sizes: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *tensors: None)
    listed, plant, forwards = tiny.rows(6), plant_of(tiny, eval_batch_size=6), []
    for index in unreadable:
        listed[index] = listed[index] | {"image": {"bytes": b"", "path": "gone.jpg"}}
    plant.base.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    found = list(plant.score(Dataset.from_list(listed, features=ROW), with_names=False))
    assert len(forwards) == 3 and sum(len(scores) for scores, _ in found) == 6 - len(unreadable)


def test_replies_are_generated_for_as_many_images_as_can_be_scored_at_a_time(tiny, monkeypatch):
    monkeypatch.setattr("models.builder.scoring_micro_batch", lambda *sizes: 2)
    rows, plant = Dataset.from_list(tiny.rows(5), features=ROW), plant_of(tiny, eval_batch_size=4)
    assert [len(found) for found, _ in plant.generate(rows, max_new_tokens=1)] == [2, 2, 1]


def test_features_come_with_the_same_scores_and_survive_a_cache(tiny):
    rows, plant = Dataset.from_list(tiny.rows(5), features=ROW), plant_of(tiny, eval_batch_size=3)
    scores = {sample.id: values for found, _ in plant.score(rows) for sample, values in found}
    examined = {sample.id: found for batch, _ in plant.score(rows, with_features=True) for sample, found in batch}
    towers = {sample.id: found for batch, _ in plant.embed(rows) for sample, found in batch}
    assert {image: found.scores for image, found in examined.items()} == scores
    for image, found in examined.items():
        assert found.tower.tolist() == towers[image].tolist() and found.tower.shape == (2 * 96,)
        assert found.state.shape == (96,) and np.linalg.norm(found.state) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(decode(encode(found.state)), found.state, atol=5e-4)
    assert len({found.state.tobytes() for found in examined.values()}) == 5
    row = tiny.collator([tiny.rows(1)[0]])
    pooled = plant.model.model.vision_tower(row["pixel_values"][:, 0]).pooler_output.detach().numpy()
    np.testing.assert_allclose(towers[row.samples[0].id][:96], scale_to_unit(pooled)[0], atol=1e-5)
    state = features_schema(plant.base.config)["state"]
    bad = [encode(np.full(96, np.nan)), encode(np.zeros(95)), "AAA", "not base64!", "", 7]
    assert state.holds(encode(np.zeros(96))) and not any(state.holds(value) for value in bad)


def replies(tiny, rows, batch_size):
    batches = plant_of(tiny, eval_batch_size=batch_size).generate(rows, max_new_tokens=6)
    return [(sample.id, reply) for replies, _ in batches for sample, reply in replies]


def test_replies_do_not_depend_on_the_batch(tiny):
    rows = Dataset.from_list(tiny.rows(7), features=ROW)
    assert replies(tiny, rows, 1) == replies(tiny, rows, 4)
    assert [sample for sample, _ in replies(tiny, rows, 3)] == rows["id"]


def test_a_wait_for_a_batch_ends(tiny, monkeypatch):
    """Also where torch's own limit does not hold, as with a worker that stops in the middle of a batch."""
    monkeypatch.setattr("runtime.interrupt.LOADER_S", -1)  # a second in all
    reader, writer = os.pipe()
    with pytest.raises(RuntimeError, match="DataLoader timed out after 1 seconds"):
        list(plant_of(tiny)._predict(tiny.rows(2), lambda rows: os.read(reader, 1), len))
    os.close(reader)
    os.close(writer)

"""The vision tower's features are kept and used again, and nothing else changes."""

import pytest
import torch
from PIL import Image
from transformers import BeitConfig

from data.sources import load_ood_images
from models.memory import MicroBatcher
from models.scoring import score_batch
from models.tower_cache import TowerCache, build_cache, find_cache, keeping_features
from models.trie import build_tries
from tests.unit.test_trainer import At, limit_memory, make_trainer, split_into, weights
from utils.logging_utils import setup_logging


def plain_trainer(tiny, folder, train_rows=None, val_rows=None, **settings):
    defaults = {"max_steps": 6, "eval_steps": 3, "logging_steps": 1, **split_into(4)}
    trainer = make_trainer(tiny, folder, train_rows, val_rows, **defaults | settings)
    trainer.model.model.vision_tower.requires_grad_(False)
    return trainer


def cached_trainer(tiny, folder, *rows, **settings):
    """(a trainer with a frozen tower and the cache that a CPU does not get, the tiles of each forward of the tower)."""
    trainer = plain_trainer(tiny, folder, *rows, **settings)
    TowerCache(trainer.model, 1e9)
    return trainer, watch(trainer.model)


def watch(model) -> list[int]:
    cache, tiles = find_cache(model), []
    stock = cache.stock
    cache.stock = lambda pixels, **kwargs: tiles.append(len(pixels)) or stock(pixels, **kwargs)
    return tiles


def losses(trainer) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]


def is_close(trainer, other) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights(trainer), weights(other)))


def test_each_image_is_computed_once_and_the_run_is_the_same(tiny, tmp_path):
    """Three epochs of 32 images, two evaluations of 10, which pool the first of an image's two tiles besides."""
    plain = plain_trainer(tiny, tmp_path / "plain")
    plain.train()
    trainer, tiles = cached_trainer(tiny, tmp_path / "cached")
    trainer.train()
    assert sum(tiles) == 2 * (32 + 10) + 2 * 10 and len(losses(plain)) == 8
    assert losses(trainer) == pytest.approx(losses(plain), abs=1e-5) and is_close(trainer, plain)


def test_what_has_no_room_is_computed_again(tiny, tmp_path):
    trainer, tiles = cached_trainer(tiny, tmp_path, eval_steps=None)
    # A forward of 4 images, of 2 tiles x 26 patches x 96 numbers in fp32: 79,872 bytes, rounded up to 131,072
    find_cache(trainer.model).capacity = 5 * 2**17
    trainer.train()
    assert len(find_cache(trainer.model).kept) == 5 * 4 and sum(tiles) == 2 * (32 + 2 * 12 + 10) + 10


def test_what_the_system_does_not_lock_is_computed_again(tiny, tmp_path, monkeypatch):
    """The GPU has room for the micro-batch, so it stays as it is."""
    trainer, _ = cached_trainer(tiny, tmp_path, eval_steps=None)
    empty = torch.empty

    def refuse(*size, pin_memory=None, **options):
        if pin_memory is not None:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    trainer.train()
    assert trainer.micro_batcher.size == 4 and not find_cache(trainer.model).kept


def test_after_out_of_memory_the_right_images_are_looked_up(tiny, tmp_path):
    plain = plain_trainer(tiny, tmp_path / "plain")
    plain.train()
    trainer, tiles = cached_trainer(tiny, tmp_path / "cached", **split_into(8))
    limit_memory(trainer.model, 5, spared=3)
    trainer.train()
    assert trainer.micro_batcher.size == 4 and sum(tiles) == 2 * (32 + 10) + 2 * 10
    assert is_close(trainer, plain)


def test_images_of_one_id_in_two_splits_are_two_images(tiny, tmp_path):
    rows = tiny.rows(20)
    val = [row | {"id": other["id"]} for row, other in zip(rows[10:], rows)]
    plain = plain_trainer(tiny, tmp_path / "plain", rows[:10], val)
    trainer, tiles = cached_trainer(tiny, tmp_path / "cached", rows[:10], val)
    plain.train()
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(plain), abs=1e-5) and sum(tiles) == 2 * 20 + 2 * 10


def test_an_image_that_was_replaced_is_computed_again(image_folder, tiny, tmp_path):
    root = image_folder({"oak": 12})
    rows = [row | {"label": 0} for row in load_ood_images(root)]
    trainer, tiles = cached_trainer(tiny, tmp_path / "run", rows, max_steps=2, eval_steps=None)
    red = Image.new("RGB", (90, 90), "red")
    trainer.add_callback(At("on_step_end", lambda state: red.save(root / "oak" / "1.png"), 1))
    trainer.train()
    assert sum(tiles) == 2 * (12 + 1 + 10) + 10


def test_elsewhere_nothing_is_looked_up(tiny, tmp_path):
    """As in a report on another split, whose images may have the same ids."""
    trainer, tiles = cached_trainer(tiny, tmp_path)
    batch = tiny.collator(tiny.rows(4))
    for _ in range(2):
        score_batch(trainer.model, batch, build_tries(tiny.collator.name_ids), MicroBatcher(4))
    assert tiles == [8, 8] and not find_cache(trainer.model).kept
    with keeping_features(trainer.model, "val"):
        trainer.model.model.vision_tower(batch["pixel_values"].flatten(0, 1))  # of images that nobody named
    assert tiles == [8, 8, 8] and not find_cache(trainer.model).kept


def test_several_feature_layers_are_kept(checkpoint, tiny):
    from transformers import LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained(checkpoint("granite")).requires_grad_(False)
    pixels = torch.randn(2, 3, 76, 76)
    expected = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    cache = TowerCache(model, 1e9)
    tiles = watch(model)
    (sample,) = tiny.collator(tiny.rows(1)).samples
    for _ in range(2):
        with keeping_features(model, "train"):
            cache.expected = [sample]
            found = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        assert all(torch.equal(found[layer], expected[layer]) for layer in (-4, -2, -1))
    assert tiles == [2]


@pytest.mark.parametrize("change", ["cpu", "augmented", "trained", "random", "once", "frozen"])
def test_the_cache_is_for_frozen_towers_on_gpus_that_see_an_image_again(change, tiny, tmp_path, monkeypatch, capsys):
    setup_logging()
    trainer = plain_trainer(tiny, tmp_path)
    assert find_cache(trainer.model) is None  # the default on a CPU
    if change != "cpu":
        monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda"))
    if change == "augmented":
        trainer.is_augmented = True
    if change == "trained":
        trainer.model.model.vision_tower.requires_grad_(True)
    if change == "random":
        trainer.model.config.vision_config = BeitConfig()
    if change == "once":
        trainer.args.max_steps = 2
    build_cache(trainer)
    assert (find_cache(trainer.model) is not None) == (change == "frozen")
    assert ("the vision tower's features are kept" in capsys.readouterr().out) == (change == "frozen")

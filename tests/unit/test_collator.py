"""Tests of collator."""

import re

import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from data.collator import IGNORED, PlantCollator
from utils.image_utils import open_image, png_image
from utils.logging_utils import UserError


class Tampered:
    """The real processor, with a fault in what it returns or is given."""

    def __init__(self, processor, after=None, text=None):
        self.processor, self.after, self.text = processor, after, text

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, images, text, **kwargs):
        if self.text:
            text = [self.text(text[0]), *text[1:]]
        encoded = self.processor(images=images, text=text, **kwargs)
        if self.after:
            self.after(encoded)
        return encoded


def rows_of(tiny, sizes):
    """Synthetic rows, resized to these (H, W), so that images differ in tokens when they keep their own size."""
    rows = []
    for row, (height, width) in zip(tiny.rows(len(sizes)), sizes):
        rows.append(row | {"image": png_image(open_image(row["image"]).resize((width, height)))})
    return rows


SIZES = [(70, 70), (40, 70), (70, 50), (33, 99)]


def test_batch_holds_the_contract(tiny):
    batch = tiny.native(rows_of(tiny, SIZES))
    images, length = batch["input_ids"].shape
    kept = batch["logits_to_keep"]
    assert images == 4 and length == max(sample.length for sample in batch.samples)
    assert batch["pixel_values"].shape == (4, 2, 3, 70, 70) and batch["image_sizes"].shape == (4, 2)
    assert batch["shift_labels"].shape == (4, len(kept)) and "attention_mask" not in batch and batch.unreadable == []
    assert len({sample.image_tokens for sample in batch.samples}) > 1
    for index, sample in enumerate(batch.samples):
        supervised = {
            position for position, label in zip(kept.tolist(), batch["shift_labels"][index]) if label != IGNORED
        }
        assert supervised == set(range(sample.prompt_length - 1, sample.length - 1))
        answer = batch["shift_labels"][index][batch["shift_labels"][index] != IGNORED]
        assert tiny.processor.tokenizer.decode(answer[:-1]).strip() == tiny.names[sample.label]
        assert answer[-1] == tiny.prompt.eos_id
        assert (batch["input_ids"][index, sample.length :] == tiny.processor.tokenizer.pad_token_id).all()


def is_same(batch, other):
    assert (batch.samples, batch.unreadable, list(batch)) == (other.samples, other.unreadable, list(other))
    return type(batch) is type(other) and all(torch.equal(batch[name], other[name]) for name in batch)


def test_a_batch_survives_workers_pinning_and_accelerate(tiny, monkeypatch):
    """All three rebuild mappings; a batch must keep its samples, and one without any its unreadable images."""
    broken = tiny.rows(1)[0] | {"image": {"bytes": b"", "path": "lily.jpg"}}
    for rows in (rows_of(tiny, SIZES), [broken]):
        batch = tiny.native(rows)
        (loaded,) = DataLoader(rows, batch_size=4, collate_fn=tiny.native, num_workers=1)
        (sharded,) = DataLoaderShard(rows, device=torch.device("cpu"), batch_size=4, collate_fn=tiny.native)
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # the real one needs a GPU
        pinned = pin_memory(batch)
        assert all(
            is_same(batch, other) for other in (loaded, sharded, pinned, send_to_device(batch, "cpu"), batch.to("cpu"))
        )
        assert pinned["labels"].data_ptr() != batch["labels"].data_ptr() or not batch.samples
        assert {tensor.device.type for tensor in send_to_device(batch, "meta").values()} == {"meta"}
    with pytest.raises(TypeError):
        type(batch)(
            {"labels": batch["labels"]}
        )  # how recursive helpers rebuild one: an error, no batch without samples


@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_micro_batches_hold_every_supervised_token_once_and_little_padding(size, tiny):
    batch = tiny.native(rows_of(tiny, SIZES * 2))
    micro_batches = batch.split(size)
    assert sum(len(micro_batch["input_ids"]) for micro_batch in micro_batches) == 8
    supervised = sum((micro_batch["labels"] != IGNORED).sum() for micro_batch in micro_batches)
    assert supervised == (batch["labels"] != IGNORED).sum()
    for micro_batch, start in zip(micro_batches, range(0, 8, size)):
        samples = batch.samples[start : start + size]
        assert micro_batch["input_ids"].shape[1] == max(sample.length for sample in samples)
        assert micro_batch["shift_labels"].shape == (len(samples), len(micro_batch["logits_to_keep"]))
        assert micro_batch["image_sizes"] == [list(sample.size) for sample in samples]


def test_the_tokenizer_is_left_padding_left(tiny):
    tiny.collator(tiny.rows(3))
    assert tiny.processor.tokenizer.padding_side == "left"


def test_leaving_the_mask_out_changes_no_supervised_logit_and_no_gradient(tiny):
    """Against the stock use: attention mask, full labels, logits of every position. In fp64, to tell no rounding."""
    batch = tiny.native(rows_of(tiny, SIZES))
    model = tiny.model().double()
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "image_sizes")}
    inputs["pixel_values"] = inputs["pixel_values"].double()
    ours = model(
        **inputs, logits_to_keep=batch["logits_to_keep"], shift_labels=batch["shift_labels"], labels=batch["labels"]
    )
    ours.loss.backward()
    our_gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    lengths = torch.tensor([sample.length for sample in batch.samples])
    starts = torch.tensor([sample.prompt_length for sample in batch.samples])
    place = torch.arange(batch["input_ids"].shape[1])
    mask = place < lengths[:, None]
    labels = batch["input_ids"].masked_fill(~mask | (place < starts[:, None]), IGNORED)
    stock = model(**inputs, attention_mask=mask.long(), labels=labels)
    stock.loss.backward()
    supervised = batch["shift_labels"] != IGNORED
    assert (ours.logits - stock.logits[:, batch["logits_to_keep"]])[supervised].abs().max() < 1e-5
    assert abs(ours.loss.item() - stock.loss.item()) < 1e-6
    stock_gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(our_gradients) == len(stock_gradients) > 50
    assert all(torch.allclose(ours, stock, atol=1e-6) for ours, stock in zip(our_gradients, stock_gradients))


# ---- injected faults: each is an error that gives the sample


def moved_token(encoded):
    ids, image, other = encoded["input_ids"], encoded["input_ids"][0].mode().values, 7
    ids[0, (ids[0] == image).nonzero()[0]] = other
    ids[1, (ids[1] != image).nonzero()[-1]] = image


def swapped_sizes(encoded):
    encoded["image_sizes"] = encoded["image_sizes"].flip(0)


def dropped_pixels(encoded):
    del encoded["pixel_values"]


def dropped_tile(encoded):
    encoded["pixel_values"][1, 1] = 0


def nan_pixel(encoded):
    encoded["pixel_values"][2, 0, 1, 5, 5] = float("nan")


def infinite_pixel(encoded):
    encoded["pixel_values"][2, 0, 1, 5, 5] = float("inf")


def truncated(encoded):
    encoded["input_ids"] = encoded["input_ids"][:, :-4]


def other_answer(encoded):
    ids = encoded["input_ids"]
    ids[0, (ids[0] == 1).nonzero()[0] - 1] = 9  # 1 is EOS


def no_eos(encoded):
    ids = encoded["input_ids"]
    ids[0, (ids[0] == 1).nonzero()[0]] = 2


def other_question(encoded):
    encoded["input_ids"][0, 1] = 9


FAULTS = [
    (moved_token, "image tokens, expected"),
    (swapped_sizes, "image_sizes is (70, 70)"),
    (dropped_pixels, "pixel_values is missing"),
    (dropped_tile, "1 tiles of pixels, expected 2"),
    (nan_pixel, "a pixel is not a finite number"),
    (infinite_pixel, "a pixel is not a finite number"),
    (truncated, "truncated to"),
    (other_answer, "its answer is"),
    (no_eos, "its last token is not the end-of-turn token '</s>'"),
    (other_question, "its prompt's tokens are not those of the prompt"),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS)
def test_a_fault_is_an_error_that_gives_the_sample(fault, words, tiny):
    collator = PlantCollator(Tampered(tiny.processor, after=fault), tiny.prompt, tiny.names, None)
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        collator(rows_of(tiny, SIZES))
    assert "test-0000" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "count"), [(lambda text: text.replace("<image>", "<image><image>"), 2), (lambda text: "no image", 0)]
)
def test_an_image_without_its_placeholder_or_with_two_is_an_error(change, count, tiny):
    collator = PlantCollator(tiny.processor, tiny.prompt, tiny.names, 70)
    collator.texts = [change(text) for text in collator.texts]
    # The processor gets a valid text, so that the error does not come from the library.
    collator.processor = Tampered(tiny.processor, text=lambda text: tiny.prompt.text(tiny.names[0]))
    with pytest.raises(UserError, match=f"sample test-00000.*{count} image placeholders in its text, expected 1"):
        collator(tiny.rows(1))


def test_a_name_that_the_tokenizer_cannot_represent_is_an_error(tiny):
    with pytest.raises(
        UserError, match="class name 'a <image> lily': its training text has 2 image tokens, expected 1"
    ):
        PlantCollator(tiny.processor, tiny.prompt, ["a <image> lily"], 70)
    spaced = tiny.prompt._replace(prompt=tiny.prompt.prompt + " ", response_prefix="")
    with pytest.raises(UserError, match="class name 'ivory trillet': the prompt has other tokens before it than alone"):
        PlantCollator(tiny.processor, spaced, ["ivory trillet"], 70)
    with pytest.raises(UserError, match="class name ' rose ': the tokenizer decodes its tokens to '"):
        PlantCollator(tiny.processor, tiny.prompt, [" rose "], 70)


# ---- unreadable images


def test_an_unreadable_image_is_skipped_and_listed(tiny):
    rows = tiny.rows(4)
    broken = rows[1] | {"image": {"bytes": b"", "path": "lily.jpg"}}
    batch = tiny.collator([rows[0], broken, rows[2]])
    assert sorted(sample.id for sample in batch.samples) == ["test-00000", "test-00002"]
    assert batch.unreadable == ["test-00001: lily.jpg: is empty (0 bytes)"]
    assert tiny.collator.prompts([rows[0], broken]).unreadable == batch.unreadable
    endless = rows[0] | {"image": {"bytes": None, "path": 300 * "a"}}
    assert "File name too long" in tiny.collator([endless]).unreadable[0]
    empty = tiny.collator([broken, broken])
    assert empty.samples == [] and empty.unreadable == 2 * batch.unreadable and empty["labels"].numel() == 0
    assert tiny.collator([]).samples == []  # of a rank that a short batch leaves without images
    prompts = tiny.collator.prompts([broken])
    assert not prompts and prompts.samples == [] and prompts.unreadable == batch.unreadable


@pytest.mark.parametrize(("size", "sizes"), [(70, [(70, 70)]), (None, SIZES)])
def test_batch_bytes_are_those_of_a_batch(tiny, size, sizes):
    collator = PlantCollator(tiny.processor, tiny.prompt, tiny.names, size)
    pixels = collator(rows_of(tiny, sizes))["pixel_values"]
    assert collator.batch_bytes(len(sizes)) == pixels.numel() * pixels.element_size()


@pytest.mark.parametrize(("image_size", "size"), [(70, (70, 70)), (None, (70, 70))])
def test_the_largest_row_becomes_as_many_tokens_as_any(image_size, size, tiny):
    names = [*tiny.names[:3], "a name much longer than all other names", *tiny.names[3:]]
    collator = PlantCollator(tiny.processor, tiny.prompt, names, image_size)
    rows = [*rows_of(tiny, SIZES), tiny.rows(1)[0] | {"image": {"bytes": b"broken", "path": None}}]
    row = collator.largest_row(rows)
    (largest,) = collator([row]).samples
    assert largest.size == size and row["label"] == 3
    assert collator.describe(row, (33, 99)).size == (size if image_size else (33, 99))
    others = [collator.describe(row | {"label": label}, other) for other in SIZES for label in range(len(names))]
    assert image_size or largest.length == max(sample.length for sample in others)


def test_prompts_are_padded_left_and_end_where_the_answer_begins(tiny):
    rows = rows_of(tiny, SIZES)
    batch = tiny.native.prompts(rows)
    expected = [tiny.native.describe(row, size) for row, size in zip(rows, SIZES)]
    assert [sample._replace(image=()) for sample in batch.samples] == expected
    for ids, mask, sample in zip(batch["input_ids"], batch["attention_mask"], batch.samples):
        assert mask.sum() == sample.prompt_length and mask[-1] == 1
        assert (ids == tiny.processor.image_token_id).sum() == sample.image_tokens

"""Rows to a padded batch, proven sample by sample before it leaves.

Shapes: B images, T text and image tokens, P tiles per image, H W tile side, K positions supervised in any sample.

The model compares only totals over a batch, and trains without a word on moved image tokens, swapped sizes or NaN
pixels. So each sample is compared here, on the CPU, with what our own arithmetic says of its image.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image

from utils.image_utils import ImageError, fit_image, fitted_size, open_image, read_image_size
from utils.logging_utils import UserError
from utils.tokenizer_utils import Prompt, count_image_tokens

IGNORED = -100  # label of a token that is not supervised


class Answer(NamedTuple):
    """A class name as training text; ids with the image token once, before it is expanded."""

    text: str
    ids: list[int]
    prompt_length: int  # tokens before the first supervised one


class Sample(NamedTuple):
    """What our own arithmetic says of one row; lengths in tokens."""

    id: str
    label: int
    size: tuple[int, int]  # (H, W) of the fitted image
    tiles: int
    image_tokens: int
    prompt_length: int
    length: int


class PlantCollator:
    """Rows -> batch for training and scoring. Images that cannot be opened are left out and named in `unreadable`.

    Raises UserError-like UserError at construction for a class name that the tokenizer cannot carry, and in a
    call for a batch that does not hold what it must.
    """

    def __init__(self, processor, prompt: Prompt, class_names: Sequence[str], image_size: int | None):
        self.processor = processor
        self.prompt = prompt
        self.class_names = class_names
        self.image_size = image_size
        self.answers = [self._build_answer(name) for name in class_names]

    @property
    def name_ids(self) -> list[list[int]]:
        """What follows the prompt for each class: the name's tokens, the end token last."""
        return [answer.ids[answer.prompt_length :] for answer in self.answers]

    def __call__(self, rows: Sequence[dict]) -> dict:
        images, kept, unreadable = self._open(rows)
        if not images:
            return {
                "samples": [],
                "unreadable": unreadable,
                "labels": torch.empty(0, dtype=torch.int64),
            }  # counted in every process
        samples = [self.describe(row, (image.height, image.width)) for row, image in zip(kept, images)]
        # Neighbours of like length, so that a micro-batch cut from this batch pads little.
        order = sorted(range(len(samples)), key=lambda index: (samples[index].tiles, samples[index].length))
        samples, images = [samples[index] for index in order], [images[index] for index in order]
        texts = [self.answers[sample.label].text for sample in samples]
        encoded = self.processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="right")
        self.validate_batch(encoded, samples, texts)
        return self._assemble(encoded, samples) | {"unreadable": unreadable}

    def prompts(self, rows: Sequence[dict]) -> dict:
        """Rows -> left-padded prompts for generation, with the true labels beside them."""
        images, kept, unreadable = self._open(rows)
        if not images:
            return {"ids": [], "unreadable": unreadable}
        encoded = self.processor(
            images=images,
            text=[self.prompt.prompt] * len(images),
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
        return {name: encoded[name] for name in names} | {
            "labels": [row["label"] for row in kept],
            "ids": [row["id"] for row in kept],
            "unreadable": unreadable,
        }

    def describe(self, row: dict, size: tuple[int, int]) -> Sample:
        """The sample that a row of this fitted (H, W) must become."""
        answer = self.answers[row["label"]]
        image_tokens, tiles = self.count_tokens(size)
        extra = image_tokens - 1  # the placeholder becomes this many more
        return Sample(
            row["id"], row["label"], size, tiles, image_tokens, answer.prompt_length + extra, len(answer.ids) + extra
        )

    def count_tokens(self, size: tuple[int, int]) -> tuple[int, int]:
        """(image tokens, tiles) of a fitted image of this (H, W)."""
        image_processor = self.processor.image_processor
        return count_image_tokens(
            size, image_processor.image_grid_pinpoints, image_processor.crop_size["height"], self.processor.patch_size
        )

    def largest_row(self, rows: Sequence[dict]) -> dict:
        """A row of plain grey that becomes as many tokens as the largest of `rows` can: image and longest name.

        Sizes are read from the images' headers, of 2,000 images at most; unreadable ones are passed over.
        """
        sizes = {fitted_size((1, 1), self.image_size)} if self.image_size else self._sizes(rows)
        height, width = max(sizes, key=lambda size: self.count_tokens(size)[0])
        longest = max(range(len(self.answers)), key=lambda label: len(self.answers[label].ids))
        file = io.BytesIO()
        Image.new("RGB", (width, height), (128, 128, 128)).save(file, "PNG")
        return {"image": {"bytes": file.getvalue(), "path": None}, "label": longest, "id": "largest"}

    @staticmethod
    def _sizes(rows) -> set[tuple[int, int]]:
        found = set()
        for index in range(0, len(rows), -(-len(rows) // 2000)):
            with contextlib.suppress(ImageError):
                found.add(read_image_size(rows[index]["image"]))
        return found or {(500, 500)}

    def batch_bytes(self, images: int) -> int:
        """Bytes of the pixels of a batch, at most: fp32, as many tiles as a image can take."""
        image_processor = self.processor.image_processor
        tile = image_processor.crop_size["height"]
        if self.image_size is None:
            most = 1 + max(height * width // tile**2 for height, width in image_processor.image_grid_pinpoints)
        else:
            _, most = self.count_tokens((self.image_size, self.image_size))
        return images * most * 3 * tile * tile * 4

    def validate_batch(self, encoded: dict, samples: Sequence[Sample], texts: Sequence[str]) -> None:
        """Raise UserError unless the processor's output is, sample by sample, what it must be."""
        for name in ("input_ids", "pixel_values", "image_sizes"):
            if encoded.get(name) is None:
                raise UserError(
                    f"batch of {samples[0].id} and {len(samples) - 1} more: {name} is missing; the model would train "
                    "on "
                    "text alone, check the processor"
                )
        finite = torch.isfinite(encoded["pixel_values"]).flatten(1).all(dim=1).tolist()
        for index, (sample, text) in enumerate(zip(samples, texts)):
            reason = self._find_fault(encoded, index, sample, text) or (
                "" if finite[index] else "a pixel is not a finite number"
            )
            if reason:
                raise UserError(
                    f"sample {sample.id}, image {sample.size[0]} x {sample.size[1]} (H x W), {sample.tiles} tiles: "
                    f"{reason}; "
                    "check that processor and model are of one checkpoint (python test_trainer.py)"
                )

    def _find_fault(self, encoded: dict, index: int, sample: Sample, text: str) -> str | None:
        ids = encoded["input_ids"][index]
        tiles = encoded["pixel_values"][index].flatten(1).any(dim=1)  # padding tiles are all zero, black ones are not
        have = int((ids == self.processor.image_token_id).sum())
        answer = self.answers[sample.label]
        expected = torch.tensor(self._expand(answer.ids, sample.image_tokens))
        supervised = ids[sample.prompt_length : sample.length].tolist()
        if text.count(self.processor.image_token) != 1:
            return f"{text.count(self.processor.image_token)} image placeholders in its text where 1 is needed"
        if tuple(encoded["image_sizes"][index].tolist()) != sample.size:
            return f"image_sizes says {tuple(encoded['image_sizes'][index].tolist())}"
        if int(tiles.sum()) != sample.tiles or not tiles[: sample.tiles].all():
            return f"{int(tiles.sum())} tiles of pixels where {sample.tiles} are expected"
        if have != sample.image_tokens:
            return f"{have} image tokens where its image gives {sample.image_tokens} feature rows"
        if len(ids) < sample.length:
            return f"truncated to {len(ids)} of {sample.length} tokens"
        if self.prompt.end_id not in supervised[-1:]:
            return f"its last token is not the end token {self.prompt.end!r}"
        if supervised[:-1] != answer.ids[answer.prompt_length : -1]:
            return (
                f"its answer reads {self.processor.tokenizer.decode(supervised[:-1])!r} where "
                f"{self.class_names[sample.label]!r} is expected"
            )
        if not torch.equal(ids[: sample.length], expected):
            return "its prompt's tokens are not those of the prompt"
        return None

    def _assemble(self, encoded: dict, samples: list[Sample]) -> dict:
        ids = encoded["input_ids"]
        # The logits of position p predict token p + 1.
        spans = [range(sample.prompt_length - 1, sample.length - 1) for sample in samples]
        keep = sorted(set().union(*spans))
        shift_labels = torch.full((len(samples), len(keep)), IGNORED)
        for index, span in enumerate(spans):
            start = keep.index(span.start)
            shift_labels[index, start : start + len(span)] = ids[index, span.start + 1 : span.stop + 1]
        return {
            "input_ids": ids,  # (B, T), padded on the right; causal attention needs no mask for that
            "pixel_values": encoded["pixel_values"],  # (B, P, 3, H, W)
            "image_sizes": encoded["image_sizes"],  # (B, 2)
            "logits_to_keep": torch.tensor(keep),  # (K,)
            "shift_labels": shift_labels,  # (B, K)
            "labels": shift_labels,  # the model computes a loss only if it is given labels; it then uses shift_labels
            "image_tokens": torch.tensor([sample.image_tokens for sample in samples]),  # (B,)
            "samples": samples,
        }

    def _open(self, rows: Sequence[dict]) -> tuple[list, list[dict], list[str]]:
        images, kept, unreadable = [], [], []
        for row in rows:
            try:
                images.append(fit_image(open_image(row["image"]), self.image_size))
                kept.append(row)
            except ImageError as error:
                unreadable.append(f"{row['id']}: {error}")
        return images, kept, unreadable

    def _build_answer(self, name: str) -> Answer:
        """Prove once per class what the masks rely on: prompt and answer are tokenized alike alone and together."""
        tokenizer = self.processor.tokenizer
        text = self.prompt.text(name)
        ids, prompt_ids = tokenizer(text).input_ids, tokenizer(self.prompt.prompt).input_ids
        supervised = ids[len(prompt_ids) :]
        if ids[: len(prompt_ids)] != prompt_ids or not supervised:
            raise UserError(
                f"class name {name!r}: the prompt is tokenized otherwise with it than alone; rename the class"
            )
        if ids.count(self.processor.image_token_id) != 1:
            raise UserError(
                f"class name {name!r}: its training text has {ids.count(self.processor.image_token_id)} image tokens "
                "where 1 is "
                "needed; rename the class"
            )
        if supervised[-1] != self.prompt.end_id or tokenizer.decode(supervised[:-1]).strip() != name:
            raise UserError(
                f"class name {name!r}: comes back from the tokenizer as {tokenizer.decode(supervised)!r}; rename the "
                "class"
            )
        return Answer(text, ids, len(prompt_ids))

    def _expand(self, ids: list[int], image_tokens: int) -> list[int]:
        place = ids.index(self.processor.image_token_id)
        return ids[:place] + [self.processor.image_token_id] * image_tokens + ids[place + 1 :]

"""Rows to a padded batch, validated sample by sample before it leaves.

Shapes: B images, T text and image tokens, P tiles per image, H W tile side, K positions supervised in any sample.

The model compares totals over a batch only: it trains without an error on moved image tokens, swapped sizes or NaN
pixels. So each sample is compared here, on the CPU, with what independent arithmetic expects of its image.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from utils.image_utils import (
    ImageError,
    count_image_tokens,
    fit_image,
    gray_image,
    image_fingerprint,
    open_image,
    read_image_size,
)
from utils.logging_utils import UserError
from utils.tensor_utils import check_tensor
from utils.tokenizer_utils import Prompt

IGNORED = -100  # label of a token that is not supervised


class Sample(NamedTuple):
    """What independent arithmetic expects of one row; lengths in tokens, image tokens included."""

    id: str
    label: int
    size: tuple[int, int]  # (H, W) of the fitted image
    tiles: int
    image_tokens: int
    prompt_length: int
    length: int
    image: tuple[int, ...] = ()  # fingerprint of what was opened: a file may be replaced while a run trains


class Batch(dict):
    """Tensors by key, and the samples in them. Empty of tensors but `labels` if no image could be read.

    - `input_ids` (B, T) int64, right padded; causal attention needs no mask for that
    - `pixel_values` (B, P, 3, H, W) fp32
    - `image_sizes` (B, 2) int64, height and width
    - `logits_to_keep` (K,) int64, positions whose logits predict a supervised token of any sample
    - `shift_labels`, and the same as `labels` (B, K) int64, the tokens to predict there, or IGNORED
    - `image_tokens` (B,) int64

    The constructor requires samples: a library that rebuilds mappings by their type fails instead of losing them.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], samples: Sequence[Sample], unreadable: Sequence[str]):
        super().__init__(tensors)
        self.samples = list(samples)
        self.unreadable = list(unreadable)  # "id: reason" of each image that could not be read

    @property
    def positions(self) -> list[int]:
        """Those whose logits predict a supervised token of any sample: the logits of position p predict token p + 1."""
        return sorted({at for sample in self.samples for at in range(sample.prompt_length - 1, sample.length - 1)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on `device`."""
        tensors = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.items()}
        return Batch(tensors, self.samples, self.unreadable)

    def split(self, size: int) -> list[dict]:
        """Micro-batches of at most `size` neighbors; see `trim`."""
        return [self.trim(slice(start, start + size)) for start in range(0, len(self.samples), size)]

    def trim(self, rows: slice) -> dict:
        """What the model takes of these samples, trimmed to their longest, most tiles and supervised positions.

        `image_sizes` is a list: the model reads each entry, and each read of a tensor would wait for the device.
        """
        samples = self.samples[rows]
        first = min(sample.prompt_length for sample in samples) - 1
        last = max(sample.length for sample in samples) - 1
        positions = self.positions
        kept = slice(positions.index(first), positions.index(last - 1) + 1)
        labels = self["shift_labels"][rows, kept].contiguous()
        return {
            "input_ids": self["input_ids"][rows, : last + 1],
            "pixel_values": self["pixel_values"][rows, : max(sample.tiles for sample in samples)],
            "image_sizes": [list(sample.size) for sample in samples],
            "logits_to_keep": self["logits_to_keep"][kept],
            "shift_labels": labels,
            "labels": labels,
        }

    def add_labels(self) -> None:
        """Add what the model needs for a loss: it computes one only if given `labels`, and then of `shift_labels`."""
        positions, input_ids = self.positions, self["input_ids"]
        labels = torch.full((len(self.samples), len(positions)), IGNORED)
        for index, sample in enumerate(self.samples):
            start, count = positions.index(sample.prompt_length - 1), sample.length - sample.prompt_length
            labels[index, start : start + count] = input_ids[index, sample.prompt_length : sample.length]
        self.update(logits_to_keep=torch.tensor(positions), shift_labels=labels, labels=labels)
        self["image_tokens"] = torch.tensor([sample.image_tokens for sample in self.samples])

    def check_tensors(self, tile: int, device: torch.device) -> None:
        """Raise UserError for shapes, dtypes or devices unlike the class's; `tile`: pixels of the tower's side."""
        images, positions = len(self.samples), self["logits_to_keep"].numel()
        check_tensor("input_ids", self["input_ids"], (images, None), torch.int64, device)
        check_tensor("pixel_values", self["pixel_values"], (images, None, 3, tile, tile), torch.float32, device)
        check_tensor("image_sizes", self["image_sizes"], (images, 2), torch.int64, device)
        check_tensor("logits_to_keep", self["logits_to_keep"], (positions,), torch.int64, device)
        check_tensor("shift_labels", self["shift_labels"], (images, positions), torch.int64, device)
        check_tensor("image_tokens", self["image_tokens"], (images,), torch.int64, device)


class PlantCollator:
    """Rows -> Batch for training and scoring; images that cannot be read are skipped and listed in `unreadable`.

    Raises UserError at construction for a class name that the tokenizer cannot represent, and in a call for a sample
    that is not what it must be.
    """

    def __init__(self, processor, prompt: Prompt, class_names: Sequence[str], image_size: int | None):
        self.processor = processor
        self.prompt = prompt
        self.class_names = class_names
        self.image_size = image_size
        self.pinpoints = getattr(processor.image_processor, "image_grid_pinpoints", [])  # LLaVA-1.5 has none
        self.texts = [prompt.text(name) for name in class_names]  # prompt, name and end of turn
        self.prompt_ids = processor.tokenizer(prompt.prompt).input_ids  # with the image token once
        # What follows the prompt for each class: the name's tokens, the end-of-turn token last.
        self.name_ids = [self._read_name(name, text) for name, text in zip(class_names, self.texts)]

    def __call__(self, rows: Sequence[dict]) -> Batch:
        images, samples, unreadable = self._open(rows)
        if not samples:  # of several ranks, one may get no image; its labels are counted all the same
            return Batch({"labels": torch.empty(0, dtype=torch.int64)}, [], unreadable)
        # Neighbors of similar length, so that a micro-batch split from this batch has little padding.
        order = sorted(range(len(samples)), key=lambda index: (samples[index].tiles, samples[index].length))
        samples, images = [samples[index] for index in order], [images[index] for index in order]
        texts = [self.texts[sample.label] for sample in samples]
        batch = Batch(self._encode(images, texts, "right"), samples, unreadable)
        batch.pop("attention_mask", None)
        for index, sample in enumerate(samples):
            if fault := self._find_fault(batch, index):
                image = f"image {sample.size[0]} x {sample.size[1]} (H x W), {sample.tiles} tiles"
                move = "check that processor and model are of the same checkpoint (python test_trainer.py)"
                raise UserError(f"sample {sample.id}, {image}: {fault}; {move}")
        batch.add_labels()
        return batch

    def _find_fault(self, batch: Batch, index: int) -> str | None:
        """What of the processor's output for a sample is not as expected."""
        if missing := {"input_ids", "pixel_values", "image_sizes"} - set(batch):
            return f"{min(missing)} is missing, and the model would train on text alone"
        sample, ids, size = batch.samples[index], batch["input_ids"][index], tuple(batch["image_sizes"][index].tolist())
        name_ids, image_token = self.name_ids[sample.label], self.processor.image_token_id
        placeholders = self.texts[sample.label].count(self.processor.image_token)
        filled = batch["pixel_values"][index].flatten(1).any(dim=1)  # padding tiles are all zero, black ones are not
        image_tokens = int((ids == image_token).sum())
        supervised = ids[sample.prompt_length : sample.length].tolist()
        if placeholders != 1:
            return f"{placeholders} image placeholders in its text, expected 1"
        if size != sample.size:
            return f"image_sizes is {size}"
        if int(filled.sum()) != sample.tiles or not filled[: sample.tiles].all():
            return f"{int(filled.sum())} tiles of pixels, expected {sample.tiles}"
        if image_tokens != sample.image_tokens:
            return f"{image_tokens} image tokens, expected {sample.image_tokens}, one for each feature row of its image"
        if len(ids) < sample.length:
            return f"truncated to {len(ids)} of {sample.length} tokens"
        if self.prompt.eos_id not in supervised[-1:]:
            return f"its last token is not the end-of-turn token {self.prompt.eos!r}"
        if supervised[:-1] != name_ids[:-1]:
            text = self.processor.tokenizer.decode(supervised[:-1])
            return f"its answer is {text!r}, expected {self.class_names[sample.label]!r}"
        place = self.prompt_ids.index(image_token)
        before, after = self.prompt_ids[:place], self.prompt_ids[place + 1 :]
        if ids[: sample.length].tolist() != [*before, *[image_token] * sample.image_tokens, *after, *name_ids]:
            return "its prompt's tokens are not those of the prompt"
        return None if torch.isfinite(batch["pixel_values"][index]).all() else "a pixel is not a finite number"

    def prompts(self, rows: Sequence[dict]) -> Batch:
        """Rows -> left-padded prompts for generation, with `attention_mask` (B, T), in the order of the rows."""
        images, samples, unreadable = self._open(rows)
        if not samples:
            return Batch({}, [], unreadable)
        return Batch(self._encode(images, [self.prompt.prompt] * len(images), "left"), samples, unreadable)

    def describe(self, row: dict, size: tuple[int, int]) -> Sample:
        """The sample that a row must become if its image has this (H, W), before it is fitted or after."""
        size = (self.image_size, self.image_size) if self.image_size else size
        image_tokens, tiles = self.count_tokens(size)
        prompt_length = len(self.prompt_ids) - 1 + image_tokens  # in the placeholder's stead
        length = prompt_length + len(self.name_ids[row["label"]])
        return Sample(row["id"], row["label"], size, tiles, image_tokens, prompt_length, length)

    def measure(self, row: dict) -> tuple[int, int]:
        """(tiles, tokens) of a row, by the header of its image; none if it cannot be read."""
        try:
            sample = self.describe(row, read_image_size(row["image"]))
        except ImageError:
            return 0, 0
        return sample.tiles, sample.length

    def count_tokens(self, size: tuple[int, int]) -> tuple[int, int]:
        """(image tokens, tiles) of a fitted image of this (H, W)."""
        tile = self.processor.image_processor.crop_size["height"]
        return count_image_tokens(size, self.pinpoints, tile, self.processor.patch_size)

    def largest_row(self, rows: Sequence[dict]) -> dict:
        """A row of plain gray that becomes as many tokens as the largest of `rows` can: image and longest name.

        Unless images are resized, the header of each is read; unreadable ones are ignored.
        """
        side, sizes = self.image_size or 500, set()
        for row in () if self.image_size else rows:
            with contextlib.suppress(ImageError):
                sizes.add(read_image_size(row["image"]))
        largest = max(sizes or {(side, side)}, key=lambda size: self.count_tokens(size)[0])
        longest = max(range(len(self.name_ids)), key=lambda label: len(self.name_ids[label]))
        return {"image": gray_image(largest), "label": longest, "id": "\0largest"}  # no image of a file has that id

    def most_prompt_tokens(self) -> int:
        """Of any image's prompt."""
        return len(self.prompt_ids) - 1 + max(tokens for tokens, _ in map(self.count_tokens, self._largest_sizes))

    def batch_bytes(self, images: int) -> int:
        """Bytes of the pixels of a batch, at most: fp32, as many tiles as an image can have."""
        tile = self.processor.image_processor.crop_size["height"]
        return images * max(tiles for _, tiles in map(self.count_tokens, self._largest_sizes)) * 3 * tile * tile * 4

    @property
    def _largest_sizes(self) -> Sequence[tuple[int, int]]:
        """(H, W) of fitted images, among them the one of most tokens."""
        if self.image_size:
            return [(self.image_size, self.image_size)]
        return self.pinpoints or [(1, 1)]  # LLaVA-1.5 makes as many of any image

    def _open(self, rows: Sequence[dict]) -> tuple[list, list[Sample], list[str]]:
        """(fitted PIL images, their samples, "id: reason" of the images that cannot be read)."""
        images, samples, unreadable = [], [], []
        for row in rows:
            fingerprint = tuple(image_fingerprint(row["image"]))  # before: of what was replaced meanwhile, the old one
            try:
                image = open_image(row["image"])
            except ImageError as error:
                unreadable.append(f"{row['id']}: {error}")
                continue
            image = fit_image(image, self.image_size, row.get("augmentation_seed"))
            images.append(image)
            samples.append(self.describe(row, (image.height, image.width))._replace(image=fingerprint))
        return images, samples, unreadable

    def _encode(self, images: list, texts: list[str], padding_side: str) -> dict[str, torch.Tensor]:
        encoded = self.processor(
            images=images, text=texts, return_tensors="pt", padding=True, padding_side=padding_side
        )
        names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
        tensors = {name: encoded[name] for name in names if encoded.get(name) is not None}
        if (pixels := tensors.get("pixel_values")) is not None and pixels.dim() == 4:  # the base view alone
            tensors["pixel_values"] = pixels[:, None]
            tensors["image_sizes"] = torch.tensor([image.size[::-1] for image in images])
        return tensors

    def _read_name(self, name: str, text: str) -> list[int]:
        """Check once per class what labels rely on: prompt and name have the same tokens alone and together."""
        tokenizer = self.processor.tokenizer
        ids, start, reason = tokenizer(text).input_ids, len(self.prompt_ids), None
        placeholders, supervised = ids.count(self.processor.image_token_id), ids[start:]
        if ids[:start] != self.prompt_ids or not supervised:
            reason = "the prompt has other tokens before it than alone"
        elif placeholders != 1:
            reason = f"its training text has {placeholders} image tokens, expected 1"
        elif supervised[-1] != self.prompt.eos_id or tokenizer.decode(supervised[:-1]).strip() != name:
            reason = f"the tokenizer decodes its tokens to {tokenizer.decode(supervised)!r}"
        if reason:
            raise UserError(f"class name {name!r}: {reason}; rename the class")
        return supervised

"""Free replies to images: greedy, left-padded batches. One of the two protocols of the published figures."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.logging_utils import is_watched


class Reply(NamedTuple):
    id: str
    label: int
    text: str


@torch.inference_mode()
def generate_batches(
    model, collator, rows, batch_size: int, num_workers: int, dtype: torch.dtype, longest: int
) -> Iterator[tuple[list[Reply], list[str]]]:
    """For each batch of rows: replies, special tokens left out, and "id: reason" of the images that do not open.

    `collator` is a data.collator.PlantCollator. Replies end at the end token, or at `longest` tokens.
    """
    tokenizer = collator.processor.tokenizer
    device = next(model.parameters()).device
    model.eval()
    loader = DataLoader(rows, batch_size, collate_fn=collator.prompts, num_workers=num_workers)
    for batch in tqdm(loader, desc="naming images", disable=not is_watched(), leave=False):
        if not batch.samples:
            yield [], batch.unreadable
            continue
        inputs = batch.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            ids = model.generate(
                **inputs, max_new_tokens=longest, do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        replies = [Reply(sample.id, sample.label, text) for sample, text in zip(batch.samples, texts, strict=True)]
        yield replies, batch.unreadable

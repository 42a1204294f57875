"""Free replies to photos: greedy, left-padded batches. One of the two protocols of the published figures."""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.logging_utils import logger


class Reply(NamedTuple):
    id: str
    label: int
    text: str


@torch.inference_mode()
def generate_replies(
    model, collator, rows, batch_size: int, num_workers: int, dtype: torch.dtype, longest: int
) -> Iterator[Reply]:
    """A reply, special tokens left out, for each row whose photo opens; each photo that does not is told in the log.

    `collator` is a data.collator.PlantCollator. Replies end at the end token, or at `longest` tokens.
    """
    tokenizer = collator.processor.tokenizer
    device = next(model.parameters()).device
    model.eval()
    loader = DataLoader(rows, batch_size, collate_fn=collator.prompts, num_workers=num_workers)
    for batch in tqdm(loader, desc="naming photos", disable=not sys.stderr.isatty(), leave=False):
        for bad in batch["bad"]:
            logger.warning("photo left out: %s", bad)
        if not batch["ids"]:
            continue
        inputs = {
            name: batch[name].to(device) for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes")
        }
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            ids = model.generate(
                **inputs, max_new_tokens=longest, do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield from map(Reply, batch["ids"], batch["labels"], texts)

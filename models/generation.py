"""Free replies to photos: greedy, left-padded batches. One of the two protocols of the published figures."""

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from models.evaluation import measure
from utils.image_utils import open_photo
from utils.logging_utils import logger
from utils.plot_utils import plot_answers

SHOWN = 12  # photos in the picture


class Reply(NamedTuple):
    id: str
    label: int
    text: str


@torch.inference_mode()
def generate_replies(model, collator, rows, batch_size: int, num_workers: int, dtype: torch.dtype) -> Iterator[Reply]:
    """A reply, special tokens left out, for each row whose photo opens; each photo that does not is told in the log.

    `collator` is a data.collator.PlantCollator. Replies end at the end token, or once longer than any class name.
    """
    tokenizer = collator.processor.tokenizer
    longest = max(len(answer.ids) - answer.prompt_length for answer in collator.answers)
    device = next(model.parameters()).device
    model.eval()
    loader = DataLoader(rows, batch_size, collate_fn=collator.prompts, num_workers=num_workers)
    for batch in tqdm(loader, desc="naming photos", disable=not sys.stderr.isatty(), leave=False):
        for bad in batch["bad"]:
            logger.warning("photo left out: %s", bad)
        inputs = {
            name: batch[name].to(device) for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes")
        }
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            ids = model.generate(
                **inputs,
                max_new_tokens=longest + 1,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield from map(Reply, batch["ids"], batch["labels"], texts)


def report_replies(
    model,
    collator,
    rows,
    split: str,
    parse: Callable[[str, list[str]], int | None],
    folder: str | Path,
    batch_size: int,
    num_workers: int,
    dtype: torch.dtype,
) -> dict:
    """Exact match of free replies on a split: eval_<split>.json (returned), a picture of some photos, a result line."""
    began = time.perf_counter()
    replies = list(generate_replies(model, collator, rows, batch_size, num_workers, dtype))
    predictions = [parse(reply.text, collator.class_names) for reply in replies]
    figures = dict(measure(predictions, [reply.label for reply in replies]))
    report = {
        "split": split,
        "protocol": "generation, exact match",
        "bad_photos": len(rows) - len(replies),
        "photos_per_s": round(len(replies) / (time.perf_counter() - began), 2),
    } | figures
    folder = Path(folder)
    (folder / f"eval_{split}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    shown = sorted(random.Random(0).sample(range(len(replies)), min(SHOWN, len(replies))))
    by_id = {row["id"]: row["image"] for row in rows}
    plot_answers(
        [open_photo(by_id[replies[index].id]) for index in shown],
        [replies[index].text for index in shown],
        [collator.class_names[replies[index].label] for index in shown],
        [predictions[index] == replies[index].label for index in shown],
        folder / f"eval_{split}.png",
    )
    logger.info(
        "result %s: top-1 %.3f, mean per class %.3f on %s photos; %d replies named no class",
        split,
        report["top1"],
        report["mean_per_class"],
        f"{report['n']:,}",
        report["unparsed"],
    )
    logger.info("result pictures: %s, %s", folder / f"eval_{split}.png", folder / "loss.png")
    return report

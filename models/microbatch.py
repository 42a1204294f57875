"""An optimizer step cut into what is computed at a time.

Shapes: B images, T text and image tokens, P tiles per image, H W tile side, K positions supervised in any sample.
"""


def split_batch(batch: dict, size: int) -> list[dict]:
    """Micro-batches of at most `size` neighbours, trimmed to their own longest sample, tiles and supervised positions.

    Of a batch of data/collator.py: `input_ids` (B, T), `pixel_values` (B, P, 3, H, W), `shift_labels` (B, K),
    `logits_to_keep` (K,). Holds what the model takes. image_sizes is a list: the model reads each entry, and from the
    device each would wait.
    """
    samples = batch["samples"]
    positions = sorted(
        {position for sample in samples for position in range(sample.prompt_length - 1, sample.length - 1)}
    )
    micro_batches = []
    for start in range(0, len(samples), size):
        rows = slice(start, start + size)
        mine = samples[rows]
        first = min(sample.prompt_length for sample in mine) - 1
        last = max(sample.length for sample in mine) - 1
        kept = slice(positions.index(first), positions.index(last - 1) + 1)
        labels = batch["shift_labels"][rows, kept].contiguous()
        micro_batches.append(
            {
                "input_ids": batch["input_ids"][rows, : last + 1],
                "pixel_values": batch["pixel_values"][rows, : max(sample.tiles for sample in mine)],
                "image_sizes": [list(sample.size) for sample in mine],
                "logits_to_keep": batch["logits_to_keep"][kept],
                "shift_labels": labels,
                "labels": labels,
            }
        )
    return micro_batches

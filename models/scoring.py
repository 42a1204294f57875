"""Exact log-probability of every class name, for a batch of images.

Shapes: B images, T prompt tokens with image tokens, right padded, N inner nodes of a trie, C names, V vocabulary.

The names form a trie of tokens. One prefill of image and question fills a cache; one forward over the trie's inner
nodes, each of which sees the prompt and its own ancestors, gives what may follow every beginning of a name.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import DynamicCache

from models.fused_layers import unwrap
from models.memory import is_out_of_memory
from utils.logging_utils import UserError, is_watched, logger

MAX_NODES = 512  # inner nodes of one forward; more names than fit become several tries
HEAD_ROWS = 1024  # rows of logits at a time: (HEAD_ROWS, V) in fp32 is 130 MB at V = 32,064


class TokenTrie(NamedTuple):
    """Some of the names as a trie; slot 0 is the prompt's last token, slot i + 1 is inner node i."""

    tokens: torch.Tensor  # (N,) of the inner nodes
    depths: torch.Tensor  # (N,) 1 for the first token of a name
    visible: torch.Tensor  # (N, N) bool: node j is node i or one of its ancestors
    edge_slots: torch.Tensor  # (E,) where an edge starts, ascending
    edge_tokens: torch.Tensor  # (E,) the token it leads to
    pair_names: torch.Tensor  # (pairs,) each name once for each of its tokens,
    pair_edges: torch.Tensor  # (pairs,) with the edge of that token


class Score(NamedTuple):
    """One image: the log-probability of each name, in nats."""

    id: str
    label: int
    values: list[float]


def build_tries(names: Sequence[Sequence[int]], max_nodes: int = MAX_NODES) -> list[TokenTrie]:
    """Trees that hold each name (its token ids, end token included) once, of at most `max_nodes` inner nodes each.

    Neighbours in token order share a trie, so that few beginnings stand in two. A name longer than that has its own.
    """
    if len(set(map(tuple, names))) < len(names):
        raise UserError("two class names are the same tokens; rename one")
    order = sorted(range(len(names)), key=lambda index: list(names[index]))
    chunks, inner = [[]], set()
    for index in order:
        prefixes = {tuple(names[index][:length]) for length in range(1, len(names[index]))}
        if chunks[-1] and len(inner | prefixes) > max_nodes:
            chunks.append([])
            inner = set()
        chunks[-1].append(index)
        inner |= prefixes
    return [_build_trie({index: tuple(names[index]) for index in chunk}) for chunk in chunks]


def _build_trie(names: dict[int, tuple[int, ...]]) -> TokenTrie:
    inner = sorted({name[:length] for name in names.values() for length in range(1, len(name))})
    slots = {(): 0} | {prefix: slot for slot, prefix in enumerate(inner, start=1)}
    edges = sorted({(slots[name[:length]], name[length]) for name in names.values() for length in range(len(name))})
    places = {edge: place for place, edge in enumerate(edges)}
    visible = torch.zeros(len(inner), len(inner), dtype=torch.bool)
    for prefix in inner:
        for length in range(1, len(prefix) + 1):
            visible[slots[prefix] - 1, slots[prefix[:length]] - 1] = True
    pairs = [
        (index, places[slots[name[:length]], name[length]])
        for index, name in names.items()
        for length in range(len(name))
    ]
    return TokenTrie(
        tokens=torch.tensor([prefix[-1] for prefix in inner], dtype=torch.int64),
        depths=torch.tensor([len(prefix) for prefix in inner], dtype=torch.int64),
        visible=visible,
        edge_slots=torch.tensor([slot for slot, _ in edges]),
        edge_tokens=torch.tensor([token for _, token in edges]),
        pair_names=torch.tensor([name for name, _ in pairs]),
        pair_edges=torch.tensor([edge for _, edge in pairs]),
    )


class MicroBatchSize:
    """Images of one forward; halved for good when they do not fit."""

    def __init__(self, size: int):
        self.size = size

    def halve(self, error: RuntimeError) -> None:
        """Raise `error` again unless it says out of memory, and UserError where a single image does not fit."""
        if not is_out_of_memory(error):
            raise error
        if self.size == 1:
            raise UserError(
                "out of memory scoring one image at a time; use --load-in-4bit true, a larger --gpu-memory-fraction, "
                "or a GPU with more memory"
            ) from error
        self.size //= 2
        logger.warning("out of memory while scoring; going on with %d images at a time", self.size)


@torch.no_grad()
def score_batch(model, batch, tries: Sequence[TokenTrie], micro_batch: MicroBatchSize) -> torch.Tensor:
    """(B, C) log-probabilities in fp32, on the device, of a batch of data/collator.py."""
    base = unwrap(model)
    names = 1 + max(int(trie.pair_names.max()) for trie in tries)
    tokens = max(int(trie.pair_names.bincount().max()) for trie in tries)  # of the longest name; read on the CPU
    device = batch["input_ids"].device
    tries = [TokenTrie(*(part.to(device) for part in trie)) for trie in tries]
    scores, start = [], 0
    while start < len(batch.samples):
        rows = slice(start, start + micro_batch.size)
        samples, inputs = batch.samples[rows], batch.trim(rows)
        longest = max(sample.prompt_length for sample in samples)
        _check_window(base, longest + tokens)
        try:
            scores.append(
                _score_images(
                    base,
                    inputs["input_ids"][:, :longest],
                    inputs["pixel_values"],
                    inputs["image_sizes"],
                    torch.tensor([sample.prompt_length for sample in samples]).to(device),
                    tries,
                    names,
                )
            )
            start += len(samples)
            continue
        except RuntimeError as error:
            micro_batch.halve(error)
        # Outside the except block, so that the failed attempt's tensors are gone with its traceback.
        clear_device_cache(garbage_collection=True)
    scores = torch.cat(scores)
    if not torch.isfinite(scores).all():
        ids = ", ".join(sample.id for sample in batch.samples)
        raise UserError(f"a score is not a finite number; try --mixed-precision bf16 or no (images: {ids})")
    return scores


def _score_images(base, input_ids, pixel_values, image_sizes, prompt_lengths, tries, names: int) -> torch.Tensor:
    images, padded = input_ids.shape
    cache = DynamicCache()
    # No mask: what lies behind a prompt is answer or padding, which causal attention keeps out of the prompt.
    hidden = base.model(
        input_ids=input_ids, pixel_values=pixel_values, image_sizes=image_sizes, past_key_values=cache, use_cache=True
    ).last_hidden_state  # (B, T, width)
    last = hidden[torch.arange(images, device=hidden.device), prompt_lengths - 1]  # (B, width)
    in_prompt = torch.arange(padded, device=hidden.device) < prompt_lengths[:, None]  # (B, T)
    scores = torch.zeros(images, names, device=hidden.device)
    for trie in tries:
        hidden = last[:, None]  # (B, 1, width), slot 0
        if len(trie.tokens):
            visible = torch.cat(
                [in_prompt[:, None].expand(-1, len(trie.tokens), -1), trie.visible.expand(images, -1, -1)], dim=2
            )  # (B, N, T + N)
            nodes = base.model(
                input_ids=trie.tokens.expand(images, -1),
                position_ids=prompt_lengths[:, None] + trie.depths - 1,
                attention_mask=_additive(visible[:, None], hidden.dtype),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # (B, N, width)
            cache.crop(-len(trie.tokens))
            hidden = torch.cat([hidden, nodes], dim=1)
        edges = _edge_log_probabilities(base.lm_head, hidden, trie)
        scores.index_add_(1, trie.pair_names, edges[:, trie.pair_edges])
    return scores


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask is silently taken for something else by eager attention."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def _edge_log_probabilities(head, hidden: torch.Tensor, trie: TokenTrie) -> torch.Tensor:
    """(B, E) log-probability of each edge's token behind its slot; logits of a few slots exist at a time."""
    images, slots = hidden.shape[:2]
    step = max(HEAD_ROWS // images, 1)
    bounds = torch.searchsorted(trie.edge_slots, torch.arange(0, slots + step, step, device=hidden.device)).tolist()
    pieces = []
    for number, start in enumerate(range(0, slots, step)):
        edges = slice(bounds[number], bounds[number + 1])
        logits = head(hidden[:, start : start + step]).float()  # (B, step, V)
        own = logits[:, trie.edge_slots[edges] - start, trie.edge_tokens[edges]]
        pieces.append(own - logits.logsumexp(dim=2)[:, trie.edge_slots[edges] - start])
    return torch.cat(pieces, dim=1)


def _check_window(base, length: int) -> None:
    window = getattr(base.config.text_config, "sliding_window", None)
    if window is not None and getattr(base.config.text_config, "use_sliding_window", True) and window < length:
        raise UserError(
            f"the language model attends to {window:,} tokens only and prompt with name has {length:,}; exact scores "
            "need the whole prompt: use --image-size 336, or --protocol generation"
        )


def score_rows(model, collator, rows, *options) -> Iterator[Score]:
    """A Score for each row whose image opens; each that does not is told in the log. Takes what score_batches does."""
    for scores, unreadable in score_batches(model, collator, rows, *options):
        for one in unreadable:
            logger.warning("photo left out: %s", one)
        yield from scores


def score_batches(
    model, collator, rows, names: Sequence[Sequence[int]], batch_size: int, num_workers: int, dtype: torch.dtype
) -> Iterator[tuple[list[Score], list[str]]]:
    """For each batch of rows, in their order: Scores in any order, and "id: reason" of the images that do not open.

    `collator` is a data.collator.PlantCollator, `names` the token ids of each class name behind the prompt.
    """
    device = next(model.parameters()).device
    tries = build_tries(names)
    micro_batch = MicroBatchSize(batch_size)
    model.eval()
    loader = DataLoader(rows, batch_size, collate_fn=collator, num_workers=num_workers)
    for batch in tqdm(loader, desc="scoring images", disable=not is_watched(), leave=False):
        scores = []
        if batch.samples:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                values = score_batch(model, batch.to(device), tries, micro_batch).tolist()
            scores = [Score(sample.id, sample.label, own) for sample, own in zip(batch.samples, values)]
        yield scores, batch.unreadable


def judge_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each image: is its likeliest name the true one; how many names rank before that; its log-probability."""
    own = scores[np.arange(len(labels)), labels]
    return scores.argmax(axis=1) == labels, (scores > own[:, None]).sum(axis=1), own

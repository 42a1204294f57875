"""Closed-set log-likelihood scoring of all class names.

Shapes: B images, T prompt tokens with image tokens, right padded, N inner nodes of a trie, C classes, V vocabulary.

The class names form a token trie. One prefill of image and question fills a KV cache; one forward over the trie's
inner nodes, each of which attends to the prompt and its ancestors, gives the exact log-probability of every name.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from data.collator import Batch, PlantCollator
from models.fused_layers import unwrap
from models.memory import MicroBatcher
from runtime.device import collect_memory
from utils.logging_utils import UserError, logger

MAX_NODES = 512  # inner nodes of one forward; more names than fit become several tries
HEAD_ROWS = 1024  # rows of logits at a time: (HEAD_ROWS, V) in fp32 is 130 MB at V = 32,064
OUT_OF_MEMORY = "out of memory scoring one image; use --load-in-4bit true or a larger GPU (--gpu-memory-fraction)"


class TokenTrie(NamedTuple):
    """A trie of class names; its edges start at slots: 0 is the prompt's last token, i + 1 is inner node i."""

    tokens: torch.Tensor  # (N,) of the inner nodes
    depths: torch.Tensor  # (N,) 1 for the first token of a name
    visible: torch.Tensor  # (N, N) bool: node j is node i or one of its ancestors
    edge_slots: torch.Tensor  # (E,) where an edge starts, ascending
    edge_tokens: torch.Tensor  # (E,) the token it leads to
    pair_names: torch.Tensor  # (P,) each name as often as it has tokens,
    pair_edges: torch.Tensor  # (P,) with the edge of each token


def build_tries(names: Sequence[Sequence[int]], max_nodes: int = MAX_NODES) -> list[TokenTrie]:
    """Tries that hold each name (its token ids, EOS included) once, of at most `max_nodes` inner nodes each.

    Neighbors in token order share a trie, so that few prefixes are in two. A longer name has a trie to itself. Raises
    UserError for two names of the same tokens.
    """
    if len(set(map(tuple, names))) < len(names):
        raise UserError("two class names are the same tokens; rename one")
    chunks: list[dict[int, tuple[int, ...]]] = [{}]
    inner: set[tuple[int, ...]] = set()
    for index, name in sorted(enumerate(map(tuple, names)), key=lambda entry: entry[1]):
        prefixes = {name[:length] for length in range(1, len(name))}
        if chunks[-1] and len(inner | prefixes) > max_nodes:
            chunks.append({})
            inner = set()
        chunks[-1][index] = name
        inner |= prefixes
    return [_build_trie(chunk) for chunk in chunks]


def _build_trie(names: dict[int, tuple[int, ...]]) -> TokenTrie:
    inner = sorted({name[:length] for name in names.values() for length in range(1, len(name))})
    slots = {prefix: slot for slot, prefix in enumerate([(), *inner])}
    visible = torch.eye(len(inner), dtype=torch.bool)
    for prefix in inner:  # parents first
        if len(prefix) > 1:
            visible[slots[prefix] - 1] |= visible[slots[prefix[:-1]] - 1]
    steps = [(index, (slots[name[:at]], name[at])) for index, name in names.items() for at in range(len(name))]
    edges = sorted({edge for _, edge in steps})
    places = {edge: place for place, edge in enumerate(edges)}
    return TokenTrie(
        tokens=torch.tensor([prefix[-1] for prefix in inner], dtype=torch.int64),
        depths=torch.tensor([len(prefix) for prefix in inner], dtype=torch.int64),
        visible=visible,
        edge_slots=torch.tensor([slot for slot, _ in edges]),
        edge_tokens=torch.tensor([token for _, token in edges]),
        pair_names=torch.tensor([index for index, _ in steps]),
        pair_edges=torch.tensor([places[edge] for _, edge in steps]),
    )


@functools.lru_cache(maxsize=1)
def tries_of(collator: PlantCollator) -> list[TokenTrie]:
    """Built once for all requests of a web demo: thousands of names take seconds."""
    return build_tries(collator.name_ids)


@torch.no_grad()
def score_batch(model, batch: Batch, tries: Sequence[TokenTrie], micro_batcher: MicroBatcher) -> torch.Tensor:
    """(B, C) log-probabilities in fp32, on the batch's device. Raises UserError for one that is not finite."""
    base = unwrap(model)
    names = 1 + max(int(trie.pair_names.max()) for trie in tries)
    tokens = max(int(trie.pair_names.bincount().max()) for trie in tries)  # of the longest name; read on the CPU
    device = batch["input_ids"].device
    tries = [TokenTrie(*(part.to(device) for part in trie)) for trie in tries]
    scores, start = [], 0
    while start < len(batch.samples):
        rows = slice(start, start + micro_batcher.size)
        lengths = [sample.prompt_length for sample in batch.samples[rows]]
        _check_window(base, max(lengths) + tokens)
        try:
            scores.append(_score_images(base, batch.trim(rows), lengths, tries, names))
            start += len(lengths)
            continue
        except RuntimeError as error:
            micro_batcher.halve(error, OUT_OF_MEMORY)
        # Outside the except block: the traceback would keep the failed attempt's tensors.
        collect_memory(device)
        logger.warning("out of memory while scoring; retrying with micro-batch %d", micro_batcher.size)
    scores = torch.cat(scores)
    if not torch.isfinite(scores).all():
        ids = ", ".join(sample.id for sample in batch.samples)
        raise UserError(f"a score is not a finite number; try --mixed-precision bf16 or no (images: {ids})")
    return scores


def _score_images(base, inputs: dict, lengths: list[int], tries: list[TokenTrie], names: int) -> torch.Tensor:
    """(B, C) log-probabilities of C = `names` class names after prompts of `lengths` tokens, all of one micro-batch."""
    input_ids = inputs["input_ids"][:, : max(lengths)]  # (B, T)
    images, padded = input_ids.shape
    prompt_lengths = torch.tensor(lengths).to(input_ids.device)  # (B,)
    cache = DynamicCache()
    # No mask: after a prompt come answer and padding, to which causal attention keeps it blind.
    hidden = base.model(
        input_ids=input_ids,
        pixel_values=inputs["pixel_values"],
        image_sizes=inputs["image_sizes"],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state  # (B, T, width)
    last = hidden[torch.arange(images, device=hidden.device), prompt_lengths - 1]  # (B, width)
    in_prompt = torch.arange(padded, device=hidden.device) < prompt_lengths[:, None]  # (B, T)
    scores = torch.zeros(images, names, device=hidden.device)
    for trie in tries:
        hidden = last[:, None]  # (B, 1, width), slot 0
        if len(trie.tokens):
            visible = torch.cat(
                [in_prompt[:, None].expand(-1, len(trie.tokens), -1), trie.visible.expand(images, -1, -1)], dim=2
            )[:, None]  # (B, 1, N, T + N)
            # Numbers to add to attention scores: eager attention silently misreads a boolean mask.
            mask = torch.zeros(visible.shape, dtype=hidden.dtype, device=hidden.device)
            mask.masked_fill_(~visible, torch.finfo(hidden.dtype).min)
            nodes = base.model(
                input_ids=trie.tokens.expand(images, -1),
                position_ids=prompt_lengths[:, None] + trie.depths - 1,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # (B, N, width)
            cache.crop(-len(trie.tokens))
            hidden = torch.cat([hidden, nodes], dim=1)
        edges = _edge_log_probabilities(base.lm_head, hidden, trie)
        scores.index_add_(1, trie.pair_names, edges[:, trie.pair_edges])
    return scores


def _edge_log_probabilities(head, hidden: torch.Tensor, trie: TokenTrie) -> torch.Tensor:
    """(B, E) log-probability of each edge's token after its slot; logits of a few slots exist at a time."""
    images, slots = hidden.shape[:2]
    step = max(HEAD_ROWS // images, 1)
    found = []
    for start in range(0, slots, step):
        inside = (trie.edge_slots >= start) & (trie.edge_slots < start + step)
        edge_slots = trie.edge_slots[inside] - start
        logits = head(hidden[:, start : start + step]).float()  # (B, step, V)
        edge_logits = logits[:, edge_slots, trie.edge_tokens[inside]]
        found.append(edge_logits - logits.logsumexp(dim=2)[:, edge_slots])
    return torch.cat(found, dim=1)


def _check_window(base, length: int) -> None:
    config = base.config.text_config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < length:
        raise UserError(
            f"the language model attends to {window:,} tokens only and prompt with name has {length:,}; exact scores "
            "need the whole prompt: use --image-size 336, or --protocol generation"
        )


def rank_true_classes(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(B, C) scores, (B,) labels -> (B,) whether the top class is the true one, how many rank above it, its score."""
    true = scores[np.arange(len(labels)), labels]
    return scores.argmax(axis=1) == labels, (scores > true[:, None]).sum(axis=1), true

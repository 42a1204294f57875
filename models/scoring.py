"""Closed-set log-likelihood scoring of all class names.

Shapes: B images, T prompt tokens with image tokens, right padded, N nodes of a token trie, E edges, C classes, V
vocabulary.

One prefill of image and question fills a KV cache; one forward over the inner nodes of the class names' trie, each of
which attends to the prompt and its ancestors, gives the exact log-probability of every name.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from data.collator import Batch, Sample
from models.fused_layers import expect_positions, unwrap
from models.memory import MicroBatcher
from models.tower_cache import expect_images
from models.trie import TokenTrie
from runtime.device import collect_memory
from utils.logging_utils import UserError, logger

HEAD_ROWS = 1024  # rows of logits at a time: (HEAD_ROWS, V) in fp32 is 130 MB at V = 32,064
OUT_OF_MEMORY = "out of memory scoring {}--load-in-4bit true or a larger GPU (--gpu-memory-fraction)"


@torch.no_grad()
def score_batch(
    model, batch: Batch, tries: Sequence[TokenTrie], micro_batcher: MicroBatcher, states: list | None = None
) -> torch.Tensor:
    """(B, C) log-probabilities in fp32, on the CPU; (B, 0) without tries. Raises UserError for one that is not finite.

    To `states` is added, for each image, the language model's last hidden state (width,) before the answer.
    """
    names = max((1 + int(trie.names.max()) for trie in tries), default=0)

    def score(base, prefill: Prefill) -> list[torch.Tensor]:
        images, scores = len(prefill.last), torch.zeros(len(prefill.last), names)
        found = [expand(base, prefill, trie, [np.flatnonzero(trie.is_inner)] * images) for trie in tries]
        for trie, (children, values) in zip(tries, found):
            sums = np.zeros((images, len(trie.parents)), dtype=np.float32)
            trie.add_up(sums, children[0], values.view(images, -1).numpy(force=True))
            ends = trie.names >= 0
            scores[:, trie.names[ends]] = torch.from_numpy(sums[:, ends])
        if states is not None:
            states.extend(prefill.last.float().numpy(force=True))
        return list(scores)

    return torch.stack(by_micro_batch(model, batch, tries, micro_batcher, score))


def by_micro_batch(
    model, batch: Batch, tries: Sequence[TokenTrie], micro_batcher: MicroBatcher, score: Callable[..., list]
) -> list:
    """What score(base, prefill) returns for each image, micro-batch by micro-batch, halved when out of memory."""
    base, found = unwrap(model), []
    tokens = max((len(trie.levels) for trie in tries), default=0)  # of the longest name
    while len(found) < len(batch.samples):
        rows = slice(len(found), len(found) + micro_batcher.size)
        samples = batch.samples[rows]
        _check_window(base, max(sample.prompt_length for sample in samples) + tokens)
        try:
            expect_images(base, samples)
            found += score(base, _prefill(base, batch.trim(rows), samples))
            continue
        except RuntimeError as error:
            size = micro_batcher.size  # above one, weights are sharded, and no rank halves it alone
            fewer = f"a micro-batch of {size}; use --per-device-eval-batch-size {size // 2}, "
            micro_batcher.halve(error, OUT_OF_MEMORY.format(fewer if size > 1 else "one image; use "))
        # Outside the except block: the traceback would keep the failed attempt's tensors.
        collect_memory(batch["input_ids"].device)
        logger.warning("out of memory while scoring; retrying with micro-batch %d", micro_batcher.size)
    return found


class Prefill(NamedTuple):
    """What the forward over images and question of a micro-batch leaves for those over the names."""

    ids: list[str]
    cache: DynamicCache
    last: torch.Tensor  # (B, width) of the last token
    lengths: torch.Tensor  # (B,)
    is_prompt: torch.Tensor  # (B, T) bool: not padding

    def select(self, images: list[int]) -> "Prefill":
        """That of some images; the cache keeps no other."""
        rows = torch.tensor(images, device=self.last.device)
        self.cache.batch_select_indices(rows)
        ids = [self.ids[image] for image in images]
        return Prefill(ids, self.cache, self.last[rows], self.lengths[rows], self.is_prompt[rows])


def _prefill(base, inputs: dict, samples: Sequence[Sample]) -> Prefill:
    lengths = [sample.prompt_length for sample in samples]
    input_ids = inputs["input_ids"][:, : max(lengths)]  # (B, T)
    prompt_lengths = torch.tensor(lengths).to(input_ids.device)
    cache = DynamicCache()
    used = sorted({at for length in lengths for at in (length - 2, length - 1)})  # one would be compiled for anew
    expect_positions(base, torch.tensor(used).to(input_ids.device))
    # No mask: after a prompt come answer and padding, to which causal attention keeps it blind.
    hidden = base.model(
        input_ids=input_ids,
        pixel_values=inputs["pixel_values"],
        image_sizes=inputs["image_sizes"],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state  # (B, T, width)
    last = hidden[torch.arange(len(lengths), device=hidden.device), prompt_lengths - 1]
    is_prompt = torch.arange(max(lengths), device=hidden.device) < prompt_lengths[:, None]
    return Prefill([sample.id for sample in samples], cache, last, prompt_lengths, is_prompt)


def expand(
    base, prefill: Prefill, trie: TokenTrie, chosen: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], torch.Tensor]:
    """(children of the inner nodes chosen for each image, log-probabilities (E,) of their tokens, image by image).

    One forward over these nodes and their ancestors. Raises UserError for a log-probability that is not finite.
    """
    nodes = [trie.add_ancestors(each) for each in chosen]
    children = [trie.children(each) for each in chosen]
    images = np.repeat(np.arange(len(chosen)), [len(each) for each in children])
    slots = [np.searchsorted(each, trie.parents[below]) for each, below in zip(nodes, children)]
    edges = np.stack([images, np.concatenate(slots), trie.tokens[np.concatenate(children)]])
    hidden = _forward(base, prefill, trie, nodes)
    values = _edge_log_probabilities(base.lm_head, hidden, torch.from_numpy(edges).to(hidden.device))
    if not torch.isfinite(values).all():
        advice = f"try --mixed-precision bf16 or no (images: {', '.join(prefill.ids)})"
        raise UserError(f"a score is not a finite number; {advice}")
    return children, values


def _forward(base, prefill: Prefill, trie: TokenTrie, nodes: Sequence[np.ndarray]) -> torch.Tensor:
    """(B, N, width) hidden states of each image's nodes, ascending; the first is the root, the end of the prompt."""
    size, last = max(map(len, nodes)), prefill.last[:, None]
    if size == 1:
        return last
    tokens, depths = np.zeros((2, len(nodes), size), dtype=int)
    visible = np.tile(np.eye(size, dtype=bool), (len(nodes), 1, 1))
    for row, each in enumerate(nodes):
        tokens[row, : len(each)], depths[row, : len(each)] = trie.tokens[each], trie.depths[each]
        above = at = np.searchsorted(each, trie.parents[each])
        while at.any():
            visible[row, np.arange(len(each)), at] = True
            at = above[at]
    tokens, depths, visible = (
        torch.from_numpy(part).to(last.device) for part in (tokens[:, 1:], depths[:, 1:], visible[:, 1:, 1:])
    )
    # The prompt is visible too; (B, 1, N, T + N)
    visible = torch.cat([prefill.is_prompt[:, None].expand(-1, size - 1, -1), visible], dim=2)[:, None]
    # Numbers to add to attention scores: eager attention silently misreads a boolean mask.
    mask = torch.zeros(visible.shape, dtype=last.dtype, device=last.device)
    mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)
    below = base.model(
        input_ids=tokens,
        position_ids=prefill.lengths[:, None] + depths - 1,
        attention_mask=mask,
        past_key_values=prefill.cache,
        use_cache=True,
    ).last_hidden_state
    prefill.cache.crop(1 - size)
    return torch.cat([last, below], dim=1)


def _edge_log_probabilities(head, hidden: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """(E,) log-probability of each edge (3, E): image, slot, token after it; logits of a few slots exist at a time."""
    step = max(HEAD_ROWS // len(hidden), 1)
    found = hidden.new_empty(edges.shape[1], dtype=torch.float32)
    for start in range(0, hidden.shape[1], step):
        inside = (edges[1] >= start) & (edges[1] < start + step)
        images, slots, tokens = edges[:, inside]
        logits = head(hidden[:, start : start + step]).float()  # (B, step, V)
        found[inside] = logits[images, slots - start, tokens] - logits.logsumexp(dim=2)[images, slots - start]
    return found


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

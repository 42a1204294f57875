"""Best-first search for the likeliest of many class names: exact, though few names are scored.

A prefix's log-probability bounds that of every name below it, and of all of them together. So the top names are known
once no prefix that was not expanded is as likely as the last of them, and what such prefixes can hold bounds the
softmax over all names.

Shapes: E edges, K names found.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.special import logsumexp

from data.collator import Batch
from models.memory import MicroBatcher
from models.scoring import Prefill, by_micro_batch, expand
from models.trie import TokenTrie

MAX_SCORED = 1000  # names that are all scored for a prediction; among more, the likeliest are searched for
MAX_WIDTH = 0.01  # of the interval in which a probability lies
EXPANDED = 1024  # nodes of a forward, of all its images: up to there an H100 computes for about as long as it launches
NEGLIGIBLE = 6.0  # nats below the node of the largest mass, from where on a node is not worth expanding yet


class Goal(NamedTuple):
    """What is asked about an image."""

    top: int  # so many of the likeliest names
    temperature: float = 1.0  # by which log-probabilities are divided
    threshold: float | None = None  # does the likeliest name's probability reach it? None: that is not asked


class Found(NamedTuple):
    """The likeliest names in order; their probabilities among all names are at least `low` and at most `high`."""

    names: np.ndarray  # (K,)
    low: np.ndarray  # (K,)
    high: np.ndarray  # (K,)
    expanded: int  # nodes


class Search:
    """What is known of the names for one image."""

    def __init__(self, trie: TokenTrie, goal: Goal):
        self.trie, self.goal = trie, goal
        self.log_counts = np.log(trie.counts)
        self.scores = np.full(len(trie.parents), np.nan)  # log-probabilities of prefixes and names, in nats
        self.scores[0] = 0.0
        self.is_expanded = np.zeros(len(trie.parents), dtype=bool)

    def add(self, children: np.ndarray, log_probabilities: np.ndarray) -> None:
        """What expanding nodes gave: all their children, ascending, with the log-probabilities (E,) of their tokens."""
        self.trie.add_up(self.scores, children, log_probabilities)
        self.is_expanded[self.trie.parents[children]] = True

    def find(self) -> Found | None:
        """The answer, unless what was not expanded could change it."""
        trie, (top, temperature, threshold) = self.trie, self.goal
        is_known = ~np.isnan(self.scores)
        fringe = np.flatnonzero(is_known & trie.is_inner & ~self.is_expanded)
        ends = np.flatnonzero(is_known & (trie.names >= 0))
        ends = ends[np.lexsort((trie.names[ends], -self.scores[ends]))]
        scores, bounds = self.scores[ends], self.scores[fringe]
        if len(fringe) and (len(ends) < top or scores[top - 1] <= bounds.max()):
            return None
        # n probabilities p of sum P: p^(1/T) sum to at most P^(1/T), or for T > 1 to n (P/n)^(1/T), where all are the
        # same. If a name begins another, their probabilities may sum to more than the prefix's.
        exponent = 1.0 if (trie.is_inner & (trie.names >= 0)).any() else max(0.0, 1 - 1 / temperature)
        known = logsumexp(scores / temperature)
        unknown = logsumexp(np.append(bounds / temperature + exponent * self.log_counts[fringe], -np.inf))
        likeliest = scores[:top] / temperature
        low, high = np.exp(likeliest - np.logaddexp(known, unknown)), np.exp(likeliest - known)
        is_open = high[0] - low[0] > MAX_WIDTH or (threshold is not None and low[0] < threshold <= high[0])
        if len(fringe) and is_open:
            return None
        return Found(trie.names[ends[:top]], low, high, int(self.is_expanded.sum()))

    def choose(self, count: int) -> np.ndarray:
        """At most `count` nodes to expand, ascending: of the largest mass if names below a prefix were alike."""
        trie = self.trie
        shares = (self.scores - self.log_counts) / max(1.0, self.goal.temperature)  # of one name
        for level in trie.levels:
            shares[level] = np.where(np.isnan(shares[level]), shares[trie.parents[level]], shares[level])
        masses = shares + self.log_counts - 1e-9 * trie.depths  # parents first
        masses[~trie.is_inner | self.is_expanded] = -np.inf
        count = min(count, int((masses > masses.max() - NEGLIGIBLE).sum()))
        return np.sort(np.argpartition(-masses, count - 1)[:count])


@torch.no_grad()
def search_batch(model, batch: Batch, trie: TokenTrie, micro_batcher: MicroBatcher, goal: Goal) -> list[Found]:
    """The likeliest names of each image. Raises UserError for a log-probability that is not finite."""

    def search(base, prefill: Prefill) -> list[Found]:
        return _search_images(base, prefill, [Search(trie, goal) for _ in prefill.ids])

    return by_micro_batch(model, batch, [trie], micro_batcher, search)


def _search_images(base, prefill: Prefill, searches: list[Search]) -> list[Found]:
    """All images of a micro-batch at once; one that is done leaves more nodes to the rest."""
    found: dict[int, Found | None] = {}
    pending, chosen = list(range(len(searches))), [np.zeros(1, dtype=int)] * len(searches)
    while True:
        children, values = expand(base, prefill, searches[0].trie, chosen)
        parts = np.split(values.double().numpy(force=True), np.cumsum([len(each) for each in children]))
        for image, below, part in zip(pending, children, parts):
            searches[image].add(below, part)
            found[image] = searches[image].find()
        rows = [row for row, image in enumerate(pending) if found[image] is None]
        if not rows:
            return list(found.values())
        if len(rows) < len(pending):
            prefill = prefill.select(rows)
        pending = [pending[row] for row in rows]
        chosen = [searches[image].choose(max(1, EXPANDED // len(pending))) for image in pending]

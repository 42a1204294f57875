"""The token trie of class names: what names share is computed once.

Nodes are in the order of their tokens: the root, node 0, first, and each parent before what is below it.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.collator import PlantCollator
from utils.logging_utils import UserError

MAX_NODES = 512  # inner nodes of one forward; more names than fit become several tries


class TokenTrie(NamedTuple):
    parents: np.ndarray  # (nodes,) the root's is itself
    tokens: np.ndarray  # (nodes,)
    depths: np.ndarray  # (nodes,) 1 for the first token of a name
    names: np.ndarray  # (nodes,) the class whose name ends here, or -1
    counts: np.ndarray  # (nodes,) names here and below
    levels: list[np.ndarray]  # the nodes of each depth from 1

    @property
    def is_inner(self) -> np.ndarray:
        """(nodes,) whether names continue below."""
        return self.counts > (self.names >= 0)

    def add_ancestors(self, nodes: np.ndarray) -> np.ndarray:
        """The nodes and all above them, ascending."""
        found = [nodes]
        while nodes.any():
            nodes = self.parents[nodes]
            found.append(nodes)
        return np.unique(np.concatenate(found))

    def children(self, nodes: np.ndarray) -> np.ndarray:
        """All of the nodes, ascending."""
        is_parent = np.zeros(len(self.parents), dtype=bool)
        is_parent[nodes] = True
        return 1 + np.flatnonzero(is_parent[self.parents[1:]])

    def add_up(self, scores: np.ndarray, children: np.ndarray, log_probabilities: np.ndarray) -> None:
        """Set scores (..., nodes) of children: their parents' and the log-probabilities (..., E) of their tokens."""
        depths = self.depths[children]
        for depth in range(1, len(self.levels) + 1):
            at = np.flatnonzero(depths == depth)
            scores[..., children[at]] = scores[..., self.parents[children[at]]] + log_probabilities[..., at]


def build_tries(names: Sequence[Sequence[int]], max_nodes: float = MAX_NODES) -> list[TokenTrie]:
    """Tries that hold each name (its token ids, EOS included) once, of at most `max_nodes` inner nodes below the root.

    Neighbors in token order share a trie, so that few prefixes are in two. A longer name has a trie to itself. Raises
    UserError for two names of the same tokens.
    """
    chunks: list[list[int]] = [[]]
    inner: set[tuple[int, ...]] = set()
    for index, name in sorted(enumerate(map(tuple, names)), key=lambda entry: entry[1]):
        prefixes = {name[:length] for length in range(1, len(name))}
        if chunks[-1] and len(inner) + len(prefixes - inner) > max_nodes:
            chunks.append([])
            inner = set()
        chunks[-1].append(index)
        inner |= prefixes
    return [_build_trie([names[index] for index in chunk], chunk) for chunk in chunks]


def _build_trie(names: Sequence[Sequence[int]], classes: Sequence[int]) -> TokenTrie:
    lengths = np.array([len(name) for name in names])
    table = np.full((len(names), lengths.max()), -1)
    for row, name in zip(table, names):
        row[: len(name)] = name
    order = np.lexsort(table.T[::-1])
    table, lengths = table[order], lengths[order]
    differs = np.logical_or.accumulate(np.diff(table, axis=0, prepend=-2) != 0, axis=1)  # from the name before
    is_new = differs & (table >= 0)
    nodes = np.maximum.accumulate(np.where(is_new, is_new.cumsum().reshape(table.shape), 0), axis=0)
    above = np.insert(nodes[:, :-1], 0, 0, axis=1)
    depths = np.append(0, 1 + np.nonzero(is_new)[1])
    ends = nodes[np.arange(len(names)), lengths - 1]
    if len(np.unique(ends)) < len(names):
        raise UserError("two class names are the same tokens; rename one")
    last = np.full(len(depths), -1)
    last[ends] = np.array(classes)[order]
    counts = np.bincount(nodes[table >= 0])
    counts[0] = len(names)
    levels = [np.flatnonzero(depths == depth) for depth in range(1, table.shape[1] + 1)]
    return TokenTrie(np.append(0, above[is_new]), np.append(0, table[is_new]), depths, last, counts, levels)


@functools.lru_cache(maxsize=2)
def tries_of(collator: PlantCollator, max_nodes: float = MAX_NODES) -> list[TokenTrie]:
    """Built once for all requests of a web demo: thousands of names take seconds."""
    return build_tries(collator.name_ids, max_nodes)

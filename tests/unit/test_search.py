"""The search for the likeliest names against the scores of all of them."""

import copy

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from models.memory import MicroBatcher
from models.scoring import score_batch
from models.search import EXPANDED, MAX_WIDTH, Goal, Search, search_batch
from models.trie import build_tries
from utils.logging_utils import UserError

EOS = 2


def random_names(rng, count, longest=5, tokens=20):
    """Distinct names of 1 to `longest` tokens and EOS; many begin others."""
    names = sorted(
        {(*rng.integers(7, 7 + tokens, rng.integers(1, longest + 1)).tolist(), EOS) for _ in range(3 * count)}
    )
    return [names[index] for index in rng.permutation(len(names))[:count]]


def scores_of(trie, log_probabilities):
    """(C,) the score of every name, if these are the log-probabilities of the nodes' tokens."""
    sums = np.zeros(len(trie.parents))
    trie.add_up(sums, np.arange(1, len(sums)), log_probabilities[1:])
    ends = trie.names >= 0
    return sums[ends][np.argsort(trie.names[ends])]


def search(trie, log_probabilities, goal, count=64):
    """(what is found, expansions in turn), where a node's token has this log-probability."""
    state, chosen, rounds = Search(trie, goal), np.zeros(1, dtype=int), 0
    while True:
        children = trie.children(chosen)
        state.add(children, log_probabilities[children])
        if found := state.find():
            return found, rounds
        chosen, rounds = state.choose(count), rounds + 1
        assert 0 < len(chosen) <= count and not state.is_expanded[chosen].any()
        parents = trie.parents[chosen]
        assert (state.is_expanded[parents] | np.isin(parents, chosen)).all()


def check(found, scores, goal):
    """Names in the order of the scores, the probabilities in their intervals, the decision that of the scores."""
    probabilities = softmax(scores / goal.temperature)
    order = np.argsort(-probabilities, kind="stable")[: goal.top]
    np.testing.assert_allclose(scores[found.names], scores[order], atol=1e-4)
    assert (found.low <= probabilities[found.names] + 1e-4).all()
    assert (probabilities[found.names] <= found.high + 1e-4).all()
    assert (found.high - found.low <= MAX_WIDTH).all()
    if goal.threshold is not None and abs(probabilities.max() - goal.threshold) > 1e-6:
        assert (found.low[0] >= goal.threshold) == (probabilities.max() >= goal.threshold)


def log_probabilities_of(trie, rng, spread):
    """Log-probabilities of a language model that leaves some of the probability to other tokens."""
    logs = rng.normal(size=len(trie.parents)) * spread
    for parent in np.flatnonzero(trie.is_inner):
        children = trie.children(np.array([parent]))
        logs[children] = log_softmax(np.append(logs[children], rng.normal() * spread - 2))[:-1]
    return logs


@pytest.mark.parametrize("temperature", [0.2, 1.0, 1.7, 6.0])
def test_what_is_found_is_what_all_scores_say(temperature):
    rng = np.random.default_rng(0)
    for trial in range(12):
        (trie,) = build_tries(random_names(rng, [1, 3, 40, 300][trial % 4]), np.inf)
        logs = log_probabilities_of(trie, rng, spread=[0.5, 2, 6][trial % 3])
        scores = scores_of(trie, logs)
        confidence = softmax(scores / temperature).max()
        for threshold in (None, 0.5, confidence, confidence + 1e-5, confidence - 1e-5):
            goal = Goal(int(rng.integers(1, 8)), temperature, threshold)
            found, _ = search(trie, logs, goal, count=int(rng.integers(1, 30)))
            check(found, scores, goal)


def test_a_high_temperature_lets_many_unlikely_names_matter():
    """2,500 names of 1e-20 hold nothing, but a fifth of the sum at temperature 5: the bound counts the names."""
    names = [(10, EOS), *((20 + prefix, 200 + end, EOS) for prefix in range(50) for end in range(50))]
    (trie,) = build_tries(names, np.inf)
    logs = np.select([trie.tokens == 10, trie.tokens >= 200, trie.tokens >= 20], np.log([0.99, 0.01, 1e-18]), 0.0)
    goal = Goal(1, 5.0, None)
    found, _ = search(trie, logs, goal, count=1)
    check(found, scores_of(trie, logs), goal)
    assert found.high[0] == pytest.approx(0.8, abs=0.011)


def test_names_that_end_inside_others_are_counted_too():
    """Where no EOS closes a name, [5] and [5, 6] are together likelier than their common prefix."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        names = {tuple(rng.integers(5, 9, rng.integers(1, 6)).tolist()) for _ in range(60)}
        (trie,) = build_tries(sorted(names), np.inf)
        assert (trie.is_inner & (trie.names >= 0)).any()
        logs = log_probabilities_of(trie, rng, spread=0.3)
        logs[trie.tokens == 5] = -1e-6  # a certain token, name after name
        goal = Goal(3, 1.0, 0.2)
        check(search(trie, logs, goal, count=2)[0], scores_of(trie, logs), goal)


def test_names_alike_in_score_come_in_the_order_of_their_classes():
    names = random_names(np.random.default_rng(2), 2000, longest=3, tokens=15)
    names = [name for name in names if len(name) == 4]
    (trie,) = build_tries(names, np.inf)
    logs = np.where(trie.tokens == EOS, 0.0, np.log(1 / 15))
    found, _ = search(trie, logs, Goal(7))
    assert found.names.tolist() == list(range(7)) and found.expanded == trie.is_inner.sum()
    np.testing.assert_allclose(found.low, found.high)


def test_a_sure_model_needs_few_expansions_and_an_unsure_one_ends_too():
    rng = np.random.default_rng(3)
    names = random_names(rng, 10_000, longest=8, tokens=90)
    (trie,) = build_tries(names, np.inf)
    for spread, most in ((9.0, 0.03), (0.0, 1.0)):
        weights = softmax(rng.normal(size=len(names)) * spread)
        masses = np.zeros(len(trie.parents))
        ends = trie.names >= 0
        masses[ends] = weights[trie.names[ends]]
        for level in reversed(trie.levels):
            np.add.at(masses, trie.parents[level], masses[level])
        logs = np.log(masses / masses[trie.parents])
        found, rounds = search(trie, logs, Goal(5), count=EXPANDED // 4)
        check(found, np.log(weights), Goal(5))
        assert found.expanded <= most * trie.is_inner.sum()
        assert rounds <= 6 or spread == 0


@pytest.fixture
def forwards():
    """forwards(model) is the list of (images, tokens) of each forward from then on."""

    def listen(model):
        found = []
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        return found

    return listen


def sharpened(tiny, factor):
    model = copy.deepcopy(tiny.model()).eval()
    model.lm_head.weight.data *= factor
    return model


@pytest.mark.parametrize("factor, temperature", [(1, 1.0), (8, 1.0), (8, 2.0), (0, 1.0)])
def test_a_model_is_searched_as_it_is_scored(tiny, forwards, factor, temperature):
    """Images of one micro-batch differ in what they need; with a factor of 0 all names of a length are alike."""
    names = random_names(np.random.default_rng(4), 300)
    model, batch = sharpened(tiny, factor), tiny.collator(tiny.rows(3))
    scores = score_batch(model, batch, build_tries(names), MicroBatcher(3)).double().numpy()
    made = forwards(model)
    goal = Goal(5, temperature, 0.3)
    found = search_batch(model, batch, *build_tries(names, np.inf), MicroBatcher(3), goal)
    for result, every in zip(found, scores, strict=True):
        check(result, every, goal)
    images = [count for count, _ in made]
    assert images[0] == 3 and images == sorted(images, reverse=True) and len(made) < 12
    assert sum(count * rows for count, rows in made[1:]) <= 3 * 2 * EXPANDED


def test_names_of_one_token_need_the_prompt_alone(tiny, forwards):
    model = tiny.model().eval()
    made = forwards(model)
    found = search_batch(model, tiny.collator(tiny.rows(2)), *build_tries([[5], [6], [7]]), MicroBatcher(2), Goal(5))
    assert len(made) == 1 and [len(result.names) for result in found] == [3, 3]


def test_out_of_memory_halves_the_micro_batch_of_a_search(tiny, monkeypatch):
    monkeypatch.setattr("models.scoring.collect_memory", lambda device: None)  # seconds, and a CPU has none to free
    names = random_names(np.random.default_rng(5), 100)
    model, batch, micro_batcher = sharpened(tiny, 4), tiny.collator(tiny.rows(4)), MicroBatcher(4)
    (trie,) = build_tries(names, np.inf)
    expected = search_batch(model, batch, trie, MicroBatcher(4), Goal(3))

    def refuse(module, args, kwargs):
        if len(kwargs["input_ids"]) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    found = search_batch(model, batch, trie, micro_batcher, Goal(3))
    assert micro_batcher.size == 1
    assert [each.names.tolist() for each in found] == [each.names.tolist() for each in expected]


def test_more_images_than_nodes_of_a_forward_are_searched_too(tiny, monkeypatch):
    (trie,) = build_tries(random_names(np.random.default_rng(5), 20), np.inf)
    model, batch = sharpened(tiny, 8), tiny.collator(tiny.rows(3))
    expected = search_batch(model, batch, trie, MicroBatcher(3), Goal(3))
    monkeypatch.setattr("models.search.EXPANDED", 2)
    found = search_batch(model, batch, trie, MicroBatcher(3), Goal(3))
    assert [each.names.tolist() for each in found] == [each.names.tolist() for each in expected]


def test_a_log_probability_that_is_no_number_ends_a_search(tiny):
    with pytest.raises(UserError, match="a score is not a finite number; .*test-00000"):
        search_batch(
            sharpened(tiny, float("nan")), tiny.collator(tiny.rows(1)), *build_tries([[5, 2]]), MicroBatcher(1), Goal(1)
        )

"""What a much cheaper model reaches: a linear probe and 5-NN on the run's own vision tower, without its language model.

Fitted on the train images, or a sample of each class. What is free is chosen on val: the L2 strength, and which half of
the tower's features (models/features.py).

Shapes: n images, m train images, C classes, D width of half the features.
"""

import time

import numpy as np
import torch
from scipy.optimize import minimize
from torch.nn.functional import cross_entropy

from evaluation.metrics import SplitScores, mcnemar, measure_accuracy
from evaluation.open_set import BLOCK, Reference, by_blocks

STRENGTHS = (1e-2, 1e-3, 1e-4)  # L2, for features of unit variance; each fit begins where the last one ended
MAX_STEPS, NEIGHBORS = 100, 5  # of L-BFGS; that vote
SIGNIFICANCE = 0.05
METRICS = ("top1", "top5", "mean_per_class")


def measure_probe(
    reference: Reference | str, val: SplitScores | None, split: SplitScores, device: torch.device
) -> dict:
    """Accuracies on a split, seconds, and a sentence on which to use; without val the middle strength is taken.

    Without the features of train images, the reason why there are none.
    """
    if isinstance(reference, str):
        return dict.fromkeys(("linear_top1", "knn_top1", "seconds")) | {"advice": f"not measured: {reference}"}
    began, classes, facts = time.perf_counter(), split.scores.shape[1], reference.facts
    train, labels = reference.features["tower"].astype("f4"), reference.labels["tower"]
    half = train.shape[1] // 2
    halves = [slice(0, half), slice(half, 2 * half)]

    def neighbors(images: SplitScores, part: slice) -> np.ndarray:
        return vote(train[:, part], labels, images.features["tower"][:, part], classes)

    def top1(scores: np.ndarray) -> float:
        return 0.0 if val is None else float((scores.argmax(axis=1) == val.labels).mean())

    part = halves[0] if val is None else max(halves, key=lambda half: top1(neighbors(val, half)))
    center, spread = train[:, part].mean(axis=0), train[:, part].std() + 1e-12

    def prepare(features: np.ndarray) -> np.ndarray:
        return np.insert((features[:, part] - center) / spread, 0, 1, axis=1)  # the first weighs the bias

    weights, fits = np.zeros((half + 1, classes)), []
    for strength in STRENGTHS if val is not None else STRENGTHS[1:2]:
        weights = fit_linear(prepare(train), labels, weights, strength, device)
        fits.append((0.0 if val is None else top1(prepare(val.features["tower"]) @ weights), strength, weights))
    _, strength, weights = max(fits, key=lambda fit: fit[0])  # of equals the first, the strongest
    linear = SplitScores(split.ids, split.labels, prepare(split.features["tower"]) @ weights)
    found: dict = {"features": "pooled" if part == halves[0] else "mean of patches", "strength": strength}
    for name, scores in (("linear", linear.scores), ("knn", neighbors(split, part))):
        measured = measure_accuracy(scores, split.labels)
        found |= {f"{name}_{metric}": measured[metric] for metric in METRICS}
    found |= {"train_images": len(labels), "of_train_images": facts["images"]}
    found["seconds"] = round(facts["seconds"] + time.perf_counter() - began, 1)
    is_sample = len(labels) < facts["images"]
    sample = f", fitted on {len(labels):,} of {facts['images']:,} train images," if is_sample else ""
    return found | compare(split, linear, sample) | {"tower_is_trained": facts["tower_is_trained"]}


def compare(model: SplitScores, probe: SplitScores, sample: str = "") -> dict:
    """McNemar's test of model and linear probe on the same images, and what follows from it in a sentence.

    `sample`: what of the train images the probe was fitted on, if not on all.
    """
    test = mcnemar(model.correct.tolist(), probe.correct.tolist())
    measured = f"{test['first']:.1%} of {test['n']:,} images right, a linear probe on its vision tower{sample}"
    measured += f" {test['second']:.1%} (p = {test['p']:.2g}, McNemar's exact test)"
    if test["p"] >= SIGNIFICANCE:
        return {"p": test["p"], "advice": f"no clear difference: the model has {measured}; the probe is far cheaper"}
    is_better = test["first"] > test["second"]
    use = "use the model" if is_better else "use the probe, a plain image classifier, and not this model"
    return {"p": test["p"], "advice": f"{use}: the model has {measured}"}


def vote(train: np.ndarray, labels: np.ndarray, images: np.ndarray, classes: int) -> np.ndarray:
    """(n, C): cosine similarities of an image's nearest neighbors, summed by class; other classes by their nearest."""
    order = np.argsort(labels, kind="stable")
    train, labels = train[order], labels[order]
    there, starts = np.unique(labels, return_index=True)
    few = min(NEIGHBORS, len(labels))

    def vote_of(block: np.ndarray) -> np.ndarray:
        near = block @ train.T  # (n, m), of features of unit length
        found = np.full((len(block), classes), -np.inf)
        found[:, there] = np.maximum.reduceat(near, starts, axis=1) - 2  # below 0, where all votes are above
        top = np.argpartition(near, -few, axis=1)[:, -few:]
        votes = np.zeros_like(found)
        np.add.at(votes, (np.arange(len(block))[:, None], labels[top]), 1 + np.take_along_axis(near, top, axis=1))
        return np.where(votes > 0, votes, found)

    return by_blocks(vote_of, images, len(train))


def fit_linear(
    features: np.ndarray, labels: np.ndarray, start: np.ndarray, strength: float, device: torch.device
) -> np.ndarray:
    """(1 + D, C) weights of multinomial logistic regression on features (m, 1 + D), whose first column is 1."""
    inputs, targets = torch.from_numpy(features).to(device, torch.float32), torch.from_numpy(labels).to(device)
    rows = max(BLOCK // start.shape[1], 1)  # whose logits exist at a time

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat.reshape(start.shape)).to(device, torch.float32).requires_grad_()
        loss = strength / 2 * weights[1:].square().sum()
        (gradient,) = torch.autograd.grad(loss, weights)
        for part, truth in zip(inputs.split(rows), targets.split(rows)):
            share = cross_entropy(part @ weights, truth) * (len(truth) / len(targets))
            gradient += torch.autograd.grad(share, weights)[0]
            loss = loss.detach() + share.detach()
        return loss.item(), gradient.double().numpy(force=True).ravel()

    fitted = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": MAX_STEPS})
    return fitted.x.reshape(start.shape)

"""Images of none of the classes: scores that set them apart from val's, side by side, and a threshold for one score.

The higher, the less an image is like the known ones. `confidence` is minus the likeliest name's probability, `log_mass`
minus the log-probability that the reply is any of the names. On features of the vision tower and of the language model,
each reduced to the principal directions of some train images: `knn`, the cosine distance to the nearest of these (Sun
et al. 2022); `mahalanobis`, the least distance to a class's mean, less that to the mean of all, each by its own
covariance (Ren et al. 2021). A sum is of scores in standard deviations of val.

The score that decides is chosen by leave-class-out: train images of a fifth of the classes are taken away, of the
principal directions too, and val's images of these are to be set apart from the rest. The model did learn these
classes: their names have the mass that would be missing, which flatters `log_mass` and `confidence`, alone and in sums.
So these are not chosen from, but scores of features alone (docs/LOG.md); "not sure" goes by confidence already.

Shapes: n images, m train images, C classes, D width of a feature, P principal directions.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
from scipy.special import logsumexp
from scipy.stats import rankdata

from evaluation.calibration import Calibration
from evaluation.metrics import SplitScores, confidence, measure_selective
from models.features import Examined, scale_to_unit

PRINCIPAL, SHRINKAGE = 128, 0.1  # directions; share of a covariance that is made the same in all (docs/LOG.md)
KEPT = 0.95  # share of val that the threshold keeps
BLOCK = 2**24  # numbers of a matrix that exist at a time
FOLDS, MIN_CLASSES, MIN_IMAGES = 5, 4, 20  # of leave-class-out; of val, below which nothing is chosen
SPACES = ("tower", "state")
SCORES = {"confidence", "log_mass", *(f"{space}_{kind}" for space in SPACES for kind in ("knn", "mahalanobis"))}
SUMS: list[tuple[str, ...]] = [("confidence", f"{space}_{kind}") for space in SPACES for kind in ("knn", "mahalanobis")]
SUMS.append(("confidence", "tower_mahalanobis", "state_mahalanobis"))


class OpenSet(TypedDict):
    """What was fitted on val; without a score, `missing` says why."""

    score: str | None  # names of scores, joined by " + "
    threshold: float | None  # above it an image is of none of the classes
    kept: float  # share of val at or below it
    scale: dict[str, list[float]]  # mean and standard deviation of each score on val
    missing: str | None
    reference: str  # identity of the train images' features, without which the threshold means nothing


class Space(NamedTuple):
    """Train images in the principal directions of their features."""

    center: np.ndarray  # (D,)
    axes: np.ndarray  # (D, P)
    points: np.ndarray  # (m, P)
    labels: np.ndarray  # (m,)


@dataclass(frozen=True)
class Reference:
    """Features of train images by space; half precision is what they are kept in."""

    features: dict[str, np.ndarray]  # {space: (m, D)}, each image's of unit length
    labels: dict[str, np.ndarray]  # {space: (m,)}
    facts: dict  # "identity": hash of what computed which images; how many there are in train; seconds of the tower

    @functools.cached_property
    def spaces(self) -> dict[str, Space]:
        """Of all train images."""
        return {name: build_space(features, self.labels[name]) for name, features in self.features.items()}

    def of_classes(self, classes: np.ndarray) -> "Reference":
        """As if there were no other classes."""
        is_chosen = {name: np.isin(labels, classes) for name, labels in self.labels.items()}
        features = {name: self.features[name][chosen] for name, chosen in is_chosen.items()}
        return Reference(features, {name: self.labels[name][chosen] for name, chosen in is_chosen.items()}, self.facts)


def build_space(features: np.ndarray, labels: np.ndarray) -> Space:
    """Of features (m, D) and labels (m,)."""
    features = features.astype(np.float64)
    center = features.mean(axis=0)
    centered = features - center
    # The smaller of the two products has the same eigenvalues.
    is_wide = centered.shape[0] < centered.shape[1]
    values, vectors = np.linalg.eigh(centered @ centered.T if is_wide else centered.T @ centered)
    kept = np.flatnonzero(values > 1e-9 * max(values[-1], 1e-9))  # none where all images are alike
    kept = kept[::-1][:PRINCIPAL]
    values, vectors = values[kept], vectors[:, kept]
    axes = centered.T @ vectors / np.sqrt(values) if is_wide else vectors
    return Space(center, axes, centered @ axes, labels)


def measure_strangeness(split: SplitScores, spaces: Mapping[str, Space], temperature: float) -> dict[str, np.ndarray]:
    """{score: (n,)} of images."""
    found = {"confidence": -confidence(split.scores, temperature)}
    if "log_mass" in split.features:
        found["log_mass"] = -split.features["log_mass"]
    return found | measure_features(split, spaces)


def measure_features(split: SplitScores, spaces: Mapping[str, Space]) -> dict[str, np.ndarray]:
    """The scores that go by features alone."""
    found = {}
    for name, space in spaces.items():
        points = (split.features[name] - space.center) @ space.axes
        found[f"{name}_knn"] = _nearest(points, space.points)
        found[f"{name}_mahalanobis"] = _relative_mahalanobis(points, space.points, space.labels)
    return found


def by_blocks(compute: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, columns: int) -> np.ndarray:
    """compute(rows), some rows at a time, where it needs a matrix of rows by `columns` that memory may not hold."""
    count = max(-(-len(rows) * columns // BLOCK), 1)
    return np.concatenate([compute(block) for block in np.array_split(rows, count)])


def _nearest(points: np.ndarray, references: np.ndarray) -> np.ndarray:
    units = scale_to_unit(references)
    return by_blocks(lambda block: 1 - (scale_to_unit(block) @ units.T).max(axis=1), points, len(units))


def _relative_mahalanobis(points: np.ndarray, references: np.ndarray, labels: np.ndarray) -> np.ndarray:
    classes, index = np.unique(labels, return_inverse=True)
    means = np.stack([references[labels == label].mean(axis=0) for label in classes])

    def whitening(residuals: np.ndarray) -> np.ndarray:
        covariance = residuals.T @ residuals / len(residuals)
        spread = np.trace(covariance) / max(len(covariance), 1) + 1e-12
        covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * spread * np.eye(len(covariance))
        return np.linalg.cholesky(np.linalg.inv(covariance))

    by_class, by_all = whitening(references - means[index]), whitening(references - references.mean(axis=0))
    whitened, centers = points @ by_class, means @ by_class
    squares = (centers**2).sum(axis=1)
    nearest = by_blocks(lambda block: (squares - 2 * block @ centers.T).min(axis=1), whitened, len(means))
    of_all = ((points - references.mean(axis=0)) @ by_all) ** 2
    return (whitened**2).sum(axis=1) + nearest - of_all.sum(axis=1)


# ---- choice and threshold


def fit_open_set(val: SplitScores, reference: Reference, temperature: float) -> OpenSet:
    """The score that is best at classes taken away, and the threshold that keeps 95 % of val; or why there is none."""
    identity, classes = reference.facts["identity"], np.unique(val.labels)
    strangeness = measure_strangeness(val, reference.spaces, temperature)
    scale = {name: [float(each.mean()), float(each.std())] for name, each in strangeness.items()}
    fitted = OpenSet(score=None, threshold=None, kept=KEPT, scale=scale, missing=None, reference=identity)
    if len(classes) < MIN_CLASSES or len(val.labels) < MIN_IMAGES:
        found = f"{len(val.labels)} images of {len(classes)} classes in val"
        fitted["missing"] = f"{found} are too few; {MIN_IMAGES} of {MIN_CLASSES} are needed"
        return fitted
    aurocs = leave_classes_out(val, reference)
    chosen = fitted["score"] = max(aurocs, key=lambda name: round(aurocs[name], 3))  # of equals the first by name
    fitted["threshold"] = float(np.quantile(strangeness[chosen], KEPT, method="higher"))
    return fitted


def combine(strangeness: Mapping[str, np.ndarray], scale: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    """The scores, and the means of several, each less its mean and in standard deviations, which are `scale`."""

    def standardize(name: str) -> np.ndarray:
        mean, deviation = scale[name]
        return (strangeness[name] - mean) / max(deviation, 1e-9)

    sums = [names for names in SUMS if scale.keys() >= {*names}]  # all, but of a file that was edited
    return dict(strangeness) | {" + ".join(names): np.mean(list(map(standardize, names)), axis=0) for names in sums}


def leave_classes_out(val: SplitScores, reference: Reference) -> dict[str, float]:
    """{score of features: mean AUROC} of val's images of a fifth of the classes, taken away, against the rest."""
    classes = np.random.default_rng(0).permutation(np.unique(val.labels))
    found: dict[str, list[float]] = {}
    for fold in range(FOLDS):
        known = np.setdiff1d(np.arange(val.scores.shape[1]), classes[fold::FOLDS])
        is_known = np.isin(val.labels, known)
        if is_known.all():  # of four classes the fifth part is empty
            continue
        for name, values in measure_features(val, reference.of_classes(known).spaces).items():
            found.setdefault(name, []).append(measure_auroc(values[is_known], values[~is_known]))
    return {name: float(np.mean(found[name])) for name in sorted(found)}


class Detector(NamedTuple):
    """Tells images of none of the classes, with what was fitted on val and the features of train images."""

    calibration: Calibration
    spaces: dict[str, Space]

    @property
    def fitted(self) -> dict:
        """An OpenSet."""
        return self.calibration.open_set or {}

    def measure(self, images: SplitScores) -> dict[str, np.ndarray]:
        """{score: (n,)} of images, sums included."""
        found = measure_strangeness(images, self.spaces, self.calibration.temperature)
        return combine(found, self.fitted["scale"])

    def find_strange(self, images: SplitScores) -> np.ndarray | None:
        """(n,) whether each gets "none of these"; None where no score was chosen."""
        score = self.fitted["score"]
        return None if score is None else self.measure(images)[score] > self.fitted["threshold"]

    def find_excess(self, images: Sequence[Examined]) -> float:
        """How far images of one plant are above the threshold, on average: above 0 they show none of the classes."""
        scores = np.array([image.scores for image in images])
        features = {"log_mass": logsumexp(scores, axis=1)}
        features |= {name: np.stack([getattr(image, name) for image in images]) for name in self.spaces}
        measured = self.measure(SplitScores([], np.zeros(len(images), dtype=int), scores, features=features))
        return float(measured[self.fitted["score"]].mean() - self.fitted["threshold"])


# ---- how well


def measure_auroc(known: np.ndarray, strange: np.ndarray) -> float:
    """The chance that a strange image scores higher than a known one; of equal scores one half."""
    ranks = rankdata(np.concatenate([strange, known]))[: len(strange)]
    return float((ranks.mean() - (len(strange) + 1) / 2) / len(known))


def measure_fpr(known: np.ndarray, strange: np.ndarray) -> float:
    """The share of strange images at or below the threshold that keeps 95 % of the known."""
    return float((strange <= np.quantile(known, KEPT, method="higher")).mean())


def measure_open_set(detector: Detector | str, split: SplitScores, others: Mapping[str, SplitScores]) -> dict:
    """{"open_set", "none_of_these"} of a report; without a detector, the reason why there is none.

    "coverage" is the share of images that get a name: sure of one, and none that gets "none of these".
    """
    if isinstance(detector, str):
        return {"open_set": [], "none_of_these": {"score": None, "missing": detector}}
    fitted, measured = detector.fitted, {kind: detector.measure(each) for kind, each in others.items()}
    measured = {"known": detector.measure(split)} | measured
    answer: dict = {name: fitted[name] for name in ("score", "threshold", "kept", "missing")}
    if score := fitted["score"]:
        beyond = {kind: each[score] > fitted["threshold"] for kind, each in measured.items()}
        answer["rates"] = {kind: float(each.mean()) for kind, each in beyond.items()}
        answer |= measure_selective(detector.calibration.accept(split.scores) & ~beyond["known"], split.correct)
    return {"open_set": tabulate(measured.pop("known"), measured), "none_of_these": answer}


def tabulate(known: Mapping[str, np.ndarray], others: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict]:
    """A row {"source", "score", "auroc", "fpr95", "n"} for each kind of other images and each score."""
    return [
        {
            "source": source,
            "score": name,
            "auroc": measure_auroc(known[name], strange[name]),
            "fpr95": measure_fpr(known[name], strange[name]),
            "n": len(strange[name]),
        }
        for source, strange in others.items()
        for name in known
    ]

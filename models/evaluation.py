"""From predictions and truth to figures. Pure: no model, no files."""

from collections import defaultdict
from collections.abc import Iterator, Sequence


def measure(predictions: Sequence[int | None], labels: Sequence[int]) -> Iterator[tuple[str, float]]:
    """(name, value) pairs; a prediction of None is a reply that is no class name, and counts as wrong.

    `top1` is the share of right answers, `mean_per_class` the mean over classes of each class's own share; papers on
    this data set report both, since its test split has 20 to 238 photos a class.
    """
    hits = defaultdict(list)
    for prediction, label in zip(predictions, labels, strict=True):
        hits[label].append(prediction == label)
    yield "n", len(labels)
    yield "top1", sum(map(sum, hits.values())) / len(labels)
    yield "mean_per_class", sum(sum(own) / len(own) for own in hits.values()) / len(hits)
    yield "unparsed", sum(prediction is None for prediction in predictions)

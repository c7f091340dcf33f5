"""Merge the sums of several processes into one, without an exchange of gradients where sketches are used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping

from loraga.distributed.ranks import EXCHANGE_BYTES, Ranks, chunks
from loraga.estimators.base import Estimator
from loraga.linalg.precision import own_precision


def merge(ranks: Ranks, estimators: Mapping[str, Estimator], scale: float) -> None:
    """Replace the sum in every estimator by the sum over ranks; each rank's sum is multiplied by its `scale` first.

    On all ranks `estimators` has the same names in the same order, and each name has the same shape. Layers of one
    shape share all-reduces of limited size: three for sketches (docs/architecture.md), one for dense buffers.
    """
    if ranks.size == 1:
        return
    alike: dict[Hashable, list[Estimator]] = defaultdict(list)
    largest = 0
    for estimator in estimators.values():
        spec = estimator.spec
        alike[type(estimator), spec.m, spec.n, spec.rank].append(estimator)
        largest = max(largest, 4 * spec.m * spec.n)
    limit = min(EXCHANGE_BYTES, largest)  # so no exchange is larger than the largest layer's gradient would be
    for group in alike.values():
        for chunk in chunks(group, lambda estimator: estimator.exchange_bytes, limit):
            with own_precision(chunk[0].spec.device):
                for value in type(chunk[0]).merging(chunk, scale):
                    ranks.sum_(value)

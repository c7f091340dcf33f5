"""Sums of several processes become one, without an exchange of any gradient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping

from loraga.distributed.ranks import EXCHANGE_BYTES, Ranks, chunks
from loraga.estimators.base import Estimator
from loraga.linalg.precision import own_precision


def merge(ranks: Ranks, estimators: Mapping[str, Estimator], scale: float) -> None:
    """Make every rank's estimators those of the sum over ranks, each rank's sums multiplied by its `scale` first.

    The mapping has the same names in the same order on all ranks, and each name the same shape. Layers of one shape
    go together in exchanges of limited size: three of them for sketches (docs/architecture.md), one for gradients.
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

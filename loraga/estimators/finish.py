"""The end of the stream: estimators of one shape are finished together, so that small layers share kernel launches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping

import torch
from torch import Tensor

from loraga.estimators.base import Estimate, Estimator
from loraga.factors import Factors
from loraga.linalg.precision import own_precision

# Bytes of state that are factorized at a time. Temporaries need a small multiple of it. Larger chunks are not faster,
# because the time of launches is negligible from here on.
FINISHED_BYTES = 2**28


def finish(
    estimators: Mapping[str, Estimator],
    divisors: Mapping[str, float],
    advance: Callable[[int], object] = lambda layers: None,
) -> dict[str, Estimate]:
    """Factors and energy of each estimator's sum divided by `divisors[name]`, in the order of `estimators`.

    Estimators with one `finish_key` (class, shape, rank, dtype, device) are finished together in chunks of bounded
    size. The state of a chunk is freed before the next chunk is stacked. The host waits for a device only after all
    chunks are queued. The same call gives the same bits. The other layers change a layer's result by no more than
    rounding, and a NaN or Inf in one layer does not change another.

    Args:
        estimators (`Mapping[str, Estimator]`): by layer. They cannot be used afterwards.
        divisors (`Mapping[str, float]`): by layer.
        advance (`Callable[[int], object]`, *optional*): called after each chunk with the number of layers in it.
    """
    factors: dict[str, Factors] = {}
    energies: dict[str, float] = {}
    by_device: dict[torch.device, tuple[list[str], list[Tensor]]] = {}
    for chunk, energy in finish_in_chunks(estimators, divisors):
        factors |= chunk
        order, parts = by_device.setdefault(energy.device, ([], []))
        order.extend(chunk)
        parts.append(energy)
        advance(len(chunk))
    for order, parts in by_device.values():
        energies.update(zip(order, torch.cat(parts).tolist(), strict=True))
    return {name: Estimate(factors[name], energies[name] / divisors[name] ** 2) for name in estimators}


def finish_in_chunks(
    estimators: Mapping[str, Estimator], divisors: Mapping[str, float]
) -> Iterator[tuple[dict[str, Factors], Tensor]]:
    """The part of `finish` that does not wait for a device.

    Yields for each chunk of layers the factors of the means by name, and the energies (b,) float64 of the sums.
    """
    for names in _chunks(estimators):
        group = [estimators[name] for name in names]
        with own_precision(group[0].spec.device):
            batch, energy = group[0].finish(group)
        # copies, because a view would keep the factors of all layers of the chunk in memory
        factors = {
            name: Factors(batch.U[i].clone(), batch.S[i] / divisors[name], batch.Vh[i].clone())
            for i, name in enumerate(names)
        }
        del batch, group
        yield factors, energy


def _chunks(estimators: Mapping[str, Estimator]) -> Iterator[list[str]]:
    """Yield names of layers to finish together."""
    groups: defaultdict[Hashable, list[str]] = defaultdict(list)
    for name, estimator in estimators.items():
        groups[estimator.finish_key].append(name)
    for names in groups.values():
        count = max(1, FINISHED_BYTES // estimators[names[0]].state_bytes)
        for start in range(0, len(names), count):
            yield names[start : start + count]

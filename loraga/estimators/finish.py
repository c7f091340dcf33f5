"""The end of the stream: estimators of one shape are finished together, so that small layers share their launches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping

import torch
from torch import Tensor

from loraga.estimators.base import Estimate, Estimator
from loraga.factors import Factors
from loraga.linalg.precision import own_precision

# State stacked at a time. What is made of it on the way is a small multiple, and this much already hides its launches.
_CHUNK_BYTES = 2**28


def finish(
    estimators: Mapping[str, Estimator],
    divisors: Mapping[str, float],
    advance: Callable[[int], object] = lambda layers: None,
) -> dict[str, Estimate]:
    """What each estimator made of its sum divided by `divisors[name]`, in the order of `estimators`.

    Estimators of one kind (class, shape, rank, dtype, device) go together in chunks of bounded size, and the state of
    a chunk is freed before the next is stacked. Nothing waits for a device until all chunks are on their way. The same
    call gives the same bits; which other layers are there changes a layer's result by no more than rounding, and NaN
    or Inf in one layer does not reach another.

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
    """The part of `finish` that waits for nothing: of a chunk of layers, factors by name and energies of the sums."""
    for names in _chunks(estimators):
        group = [estimators[name] for name in names]
        with own_precision(group[0].spec.device):
            batch, energy = group[0].finish(group)
        # copies: a view would hold on to the factors of the whole chunk
        factors = {
            name: Factors(batch.U[i].clone(), batch.S[i] / divisors[name], batch.Vh[i].clone())
            for i, name in enumerate(names)
        }
        del batch, group
        yield factors, energy


def _chunks(estimators: Mapping[str, Estimator]) -> Iterator[list[str]]:
    """Names of layers to finish together."""
    kinds: defaultdict[Hashable, list[str]] = defaultdict(list)
    for name, estimator in estimators.items():
        kinds[estimator.kind].append(name)
    for names in kinds.values():
        count = max(1, _CHUNK_BYTES // estimators[names[0]].state_bytes)
        for start in range(0, len(names), count):
            yield names[start : start + count]

"""Nothing random of the caller's is used up, whatever his loader, model and loss draw."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy
import pytest
import torch
from tiny import MLP, init, mlp_batches

import loraga
from loraga.capture.isolation import rng_untouched


def draws() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.random()), float(torch.rand(()))


class Drawing:
    """A loader that draws from each global generator, as shuffling and augmenting ones do."""

    def __iter__(self):
        for batch in mlp_batches():
            draws()
            yield batch


def fail() -> None:
    with rng_untouched():
        draws()
        raise RuntimeError("in between")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: init(MLP(), Drawing()), id="fast_init"),
        pytest.param(lambda: loraga.estimate_factors(MLP(), Drawing(), rank=4), id="estimate_factors"),
        pytest.param(fail, id="an error"),
    ],
)
def test_the_generators_of_python_numpy_and_torch_are_put_back(call: Callable[[], object]):
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    expected = draws()
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    try:
        call()
    except RuntimeError as error:
        assert str(error) == "in between"
    assert draws() == expected

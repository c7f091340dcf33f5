"""Dense buffers are bfloat16 up to as many micro-batches as that bears, and float32 beyond."""

from __future__ import annotations

import pytest
import torch
from micro_batches import spec
from peft import LoraConfig
from torch import nn

import loraga
from loraga.estimators import BFLOAT16_LIMIT, Streaming, make_estimators

DENSE = {"estimator": "dense"}


@pytest.mark.parametrize(
    ("options", "many", "formed", "dtype"),
    [
        (DENSE, False, False, torch.bfloat16),
        (DENSE, True, False, torch.float32),
        (DENSE, True, True, torch.float32),
        ({**DENSE, "buffer_dtype": "bfloat16"}, True, False, torch.bfloat16),
        ({**DENSE, "buffer_dtype": "float32"}, False, False, torch.float32),
        ({}, False, False, torch.float32),  # too small a layer for a sketch
        ({}, False, True, torch.float32),
        ({"buffer_dtype": "bfloat16"}, False, True, torch.bfloat16),
    ],
)
def test_dtype_of_a_buffer(options, many, formed, dtype):
    (estimator,) = make_estimators([spec()], loraga.InitConfig(**options), 4, many=many, formed=formed)
    (buffer,) = estimator.state
    assert buffer.dtype == dtype


def test_a_large_layer_is_streamed_unless_its_gradient_is_formed():
    large, init = spec(1600, 1600), loraga.InitConfig()
    assert isinstance(make_estimators([large], init, 4)[0], Streaming)
    assert not isinstance(make_estimators([large], init, 4, formed=True)[0], Streaming)


class Unsized:
    """A loader that does not say how many micro-batches come."""

    def __init__(self, batches: list[dict[str, torch.Tensor]]) -> None:
        self._batches = batches

    def __iter__(self):
        return iter(self._batches)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(x).square().mean()}


@pytest.mark.parametrize(
    ("count", "known", "bytes_per_number"),
    [(BFLOAT16_LIMIT, True, 2), (BFLOAT16_LIMIT + 1, True, 4), (3, False, 4)],
)
def test_the_limit_is_that_of_the_micro_batches_that_come(count, known, bytes_per_number):
    batches = [{"x": torch.randn(2, 6)}] * count
    loader = batches if known else Unsized(batches)
    model = loraga.fast_init(
        Small(),
        loader,
        LoraConfig(r=2, target_modules=["layer"]),
        init=loraga.InitConfig(**DENSE),
        show_progress_bar=False,
    )
    assert BFLOAT16_LIMIT == 256
    assert model.loraga_report.state_bytes == 5 * 6 * bytes_per_number

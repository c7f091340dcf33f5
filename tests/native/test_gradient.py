"""The native gradient sum against float64, over types, layouts and shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraga.ops import native_core

if not native_core.available():
    pytest.skip(f"needs the native core: {native_core.why_unavailable()}", allow_module_level=True)

DEVICES = ["cpu"] + (["cuda"] if native_core.available("cuda") else [])
SUMS = [torch.float32, torch.bfloat16]
GRADIENTS = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda: torch.randn(6, 3, 2, 5),
    "contiguous, not aligned": lambda: torch.randn(181)[1:],
    "channels last": lambda: torch.randn(6, 3, 2, 5).contiguous(memory_format=torch.channels_last),
    "channels last 3d": lambda: torch.randn(4, 3, 2, 2, 5).contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda: torch.randn(7, 9).T,
    "slice": lambda: torch.randn(9, 4, 8)[1:7, :, 2::3],
    "expanded": lambda: torch.randn(5, 1).expand(5, 8),
    "vector": lambda: torch.randn(33),
    "number": lambda: torch.randn(()),
    "size one": lambda: torch.randn(4, 1, 3, 1, 2).transpose(0, 2),
    "empty": lambda: torch.randn(0, 3),
}


def exact(total: torch.Tensor, gradient: torch.Tensor, scale: float) -> torch.Tensor:
    """The sum in float64, where it is exact but for one rounding far below float32's."""
    return total.double() + scale * gradient.double().reshape(total.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounded_to_nearest_once(layout, gradients, sums, device):
    gradient = LAYOUTS[layout]().to(device, gradients)
    total = torch.randn(gradient.numel(), device=device).to(sums)
    before = total.clone()
    added = native_core.gradient_add(total, gradient, 0.75)
    assert added.dtype == torch.bool and added.dim() == 0 and bool(added)
    expected = exact(before, gradient.reshape(-1), 0.75)
    assert torch.equal(total, expected.float().to(sums))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("gradients", GRADIENTS)
def test_nothing_is_added_where_the_gradient_is_not_finite(gradients, bad, device):
    gradient = torch.randn(70, 50, device=device).to(gradients)
    gradient[69, 49] = bad
    total = torch.randn(70, 50, device=device)
    before = total.clone()
    assert not bool(native_core.gradient_add(total, gradient))
    assert torch.equal(total, before)
    # the caller has looked at the whole gradient: this part is to be left out though it is finite itself
    no, yes = (torch.tensor(value, device=device) for value in (False, True))
    assert native_core.gradient_add(total[:9], gradient[:9], 1.0, no) is no
    assert torch.equal(total, before)
    assert native_core.gradient_add(total[:9], gradient[:9], 1.0, yes) is yes
    assert torch.equal(total[:9], before[:9] + gradient[:9].float()) and torch.equal(total[9:], before[9:])


@pytest.mark.parametrize("device", DEVICES)
def test_extremes_of_half_precision(device):
    gradient = torch.tensor([6.0e-8, -5.9e-8, 65504.0, -65504.0, 0.0, -0.0], device=device, dtype=torch.float16)
    total = torch.zeros(6, device=device)
    native_core.gradient_add(total, gradient, 2.0)
    assert torch.equal(total, 2.0 * gradient.float())


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), min_size=0, max_size=5),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 3),
    types=st.tuples(st.sampled_from(SUMS), st.sampled_from(GRADIENTS)),
    exponent=st.integers(-6, 6),
    seed=st.integers(0, 2**31),
)
def test_any_strides(shape, order, step, types, exponent, seed):
    g = torch.Generator().manual_seed(seed)
    axes = list(range(len(shape)))
    order.shuffle(axes)
    stored = torch.randn([shape[axis] * step for axis in axes], generator=g).to(types[1])
    gradient = stored[tuple(slice(None, None, step) for _ in axes)].permute([axes.index(i) for i in range(len(shape))])
    assert list(gradient.shape) == shape
    total = torch.randn(gradient.numel(), generator=g).to(types[0])
    expected = exact(total, gradient.reshape(-1), 2.0**exponent).float().to(types[0])
    assert bool(native_core.gradient_add(total, gradient, 2.0**exponent))
    assert torch.equal(total, expected)


@pytest.mark.parametrize(
    ("total", "gradient", "finite", "error", "says"),
    [
        ([1.0], torch.ones(1), None, TypeError, "total must be a torch.Tensor, not list"),
        (torch.ones(1).half(), torch.ones(1), None, TypeError, "total .*float32, bfloat16, not .*float16"),
        (torch.ones(1), torch.ones(1).double(), None, TypeError, "gradient .*float16, not .*float64"),
        (torch.ones(2, 2), torch.eye(2).to_sparse(), None, TypeError, "dense tensor .* not torch.sparse_coo"),
        (torch.ones(3, 2).T, torch.ones(2, 3), None, ValueError, "total must be contiguous"),
        (torch.ones(4), torch.ones(5), None, ValueError, r"\(4,\) on cpu and gradient \(5,\).*as many entries"),
        (torch.ones(1), torch.ones(1, 1, 1, 1, 1, 1), None, ValueError, "6 dimensions; allowed are up to 5"),
        (torch.ones(4), torch.ones(4), torch.ones(()), ValueError, "finite must be one bool"),
        (torch.ones(4, device="meta"), torch.ones(4, device="meta"), None, ValueError, "not on meta"),
    ],
)
def test_wrong_arguments(total, gradient, finite, error, says):
    with pytest.raises(error, match=says):
        native_core.gradient_add(total, gradient, 1.0, finite)

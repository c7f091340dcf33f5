"""Whole calls on a CUDA device: what they promise on the CPU they keep there.

The same bodies run on the CPU, which shows that they ask for the right thing; what is about CUDA alone holds there
anyway. The default device is the CPU throughout, also for a model on another.
"""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny import STARTS, R, assert_plain, batches, build, captured, config, exact_gradients, init, matrices
from torch import nn

import loraga
from loraga import InitConfig

DEVICES = [
    "cpu",
    pytest.param("cuda:0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
    pytest.param("cuda:1", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")),
]
pytestmark = pytest.mark.parametrize("device", DEVICES)


def model_on(device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights everywhere; plain attention, whose backward gives the same bits again on a GPU."""
    return build("llama", attn_implementation="eager").to(device, dtype)


def assert_captures(factors: dict[str, loraga.Factors]) -> None:
    """Orthonormal, and of the gradient's leading directions as float32 on the CPU has it."""
    gradients = exact_gradients(build("llama"), list(factors), batches("llama"))
    assert len(factors) == 14
    for name, found in factors.items():
        here = loraga.Factors(*(part.cpu() for part in (found.U, found.S, found.Vh)))
        assert captured(gradients[name], here) > 0.95
        assert_orthonormal(here)
        torch.testing.assert_close(here.S[:R].double(), torch.linalg.svdvals(gradients[name])[:R], rtol=0.05, atol=0)


def assert_orthonormal(factors: loraga.Factors) -> None:
    for basis in (factors.U.double().mT, factors.Vh.double()):
        eye = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
        assert torch.linalg.matrix_norm(basis @ basis.mT - eye, 2) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_those_of_the_cpu(dtype, device):
    factors = loraga.estimate_factors(model_on(device, dtype), batches("llama"), rank=2 * R)
    assert all(part.device == torch.device(device) for f in factors.values() for part in (f.U, f.S, f.Vh))
    assert_captures(factors)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_function_is_unchanged(dtype, start, device):
    model = model_on(device, dtype)
    batch = {name: values.to(device) for name, values in batches("llama")[0].items()}
    with torch.no_grad():
        expected = model(**batch).logits
        peft_model = init(model, batches("llama"), init=InitConfig(start=start))
        assert_plain(peft_model, get_peft_model(model_on(device, dtype), config()))
        assert {parameter.device for parameter in peft_model.parameters()} == {torch.device(device)}
        with peft_model.disable_adapter():
            assert torch.equal(peft_model(**batch).logits, expected)
        unlike = (peft_model(**batch).logits - expected).abs().max() / expected.abs().max()
        assert unlike <= (0 if start == "zero-b" else 2e-5 if dtype == torch.float32 else 2e-2)
    peft_model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in peft_model.parameters() if p.requires_grad)


def test_gradient_checkpointing_gives_the_same_factors(device):
    model = model_on(device)
    plain = loraga.estimate_factors(model, batches("llama"), rank=2 * R)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for name, found in loraga.estimate_factors(model, batches("llama"), rank=2 * R).items():
        torch.testing.assert_close(found.S, plain[name].S, rtol=1e-4, atol=0)


def test_sums_in_host_memory_give_the_same_start(device):
    kinds = {"estimator": "dense", "buffer_dtype": "float32", "staging_bytes": 2**19}  # several blocks a buffer
    here, there = (
        init(model_on(device), batches("llama"), init=InitConfig(buffer_device=place, **kinds))
        for place in ("model", "cpu")
    )
    for layer in here.loraga_report.layers:
        for ours, theirs in zip(matrices(there, layer.name), matrices(here, layer.name), strict=True):
            assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


def test_inside_autocast(device):
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        factors = loraga.estimate_factors(model_on(device), batches("llama"), rank=2 * R)
    assert_captures(factors)


def test_tf32_changes_nothing(device):
    """A bfloat16 model multiplies no float32: what is left to differ is our own arithmetic."""
    model = model_on(device, torch.bfloat16)
    plain = loraga.estimate_factors(model, batches("llama"), rank=2 * R)
    before = torch.get_float32_matmul_precision()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        allowed = loraga.estimate_factors(model, batches("llama"), rank=2 * R)
    finally:
        torch.set_float32_matmul_precision(before)
    for name, found in allowed.items():
        assert_orthonormal(found)
        torch.testing.assert_close(found.S, plain[name].S, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.U @ found.Vh, plain[name].U @ plain[name].Vh, rtol=0, atol=1e-4)

"""The offsets on one layer, without PEFT: s (B A - B0 A0) in every form it takes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from loraga import offsets
from loraga.offsets import AdapterSlot, Anchored, Shifted

M, N, R, S = 13, 21, 3, 0.7


def slot_of(transposed: bool = False, dtype: torch.dtype = torch.float64, bias: bool = False) -> AdapterSlot:
    torch.manual_seed(0)
    base = nn.Linear(M, N, bias=False) if transposed else nn.Linear(N, M, bias=False)
    lora_A, lora_B = nn.Linear(N, R, bias=False), nn.Linear(R, M, bias=bias)
    nn.init.zeros_(lora_B.weight)
    for module in (base, lora_A, lora_B):
        module.to(dtype)
    return AdapterSlot("layer", None, base, transposed, lora_A, lora_B, R, S, (M, N))


def start(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(R, N, generator=generator), torch.randn(M, R, generator=generator)


def effective(slot: AdapterSlot) -> torch.Tensor:
    """W + s B A as the forward computes it, (m, n)."""
    weight = slot.base_layer.weight.T if slot.transposed else slot.base_layer.weight
    eye = torch.eye(N, dtype=weight.dtype)
    return (weight + slot.scaling * slot.lora_B(slot.lora_A(eye)).T).detach()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("write", [offsets.write_anchor, offsets.write_subtract, offsets.write_zero_b])
def test_every_offset_keeps_the_layer(write, transposed):
    slot = slot_of(transposed)
    before = effective(slot)
    write(slot, *start())
    torch.testing.assert_close(effective(slot), before, rtol=0, atol=1e-13)


def test_none_moves_the_layer_by_one_step():
    slot, (A0, B0) = slot_of(), start()
    before = effective(slot)
    offsets.write_none(slot, A0, B0)
    torch.testing.assert_close(effective(slot), before + S * (B0 @ A0).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_three_forms_of_one_update(transposed):
    """After any training, anchor and subtract are the same layer, and both save what is right on the original W."""
    original = slot_of(transposed)
    A0, B0 = start()
    A, B = start(seed=2)
    expected = effective(original) + S * (B.double() @ A.double() - B0.double() @ A0.double())
    for write in (offsets.write_anchor, offsets.write_subtract):
        slot = slot_of(transposed)
        write(slot, A0, B0)
        with torch.no_grad():
            slot.lora_A.trained.copy_(A)
            slot.lora_B.trained.copy_(B)
        torch.testing.assert_close(effective(slot), expected, rtol=0, atol=1e-12)
        whole_A, whole_B = slot.lora_A.state_dict()["weight"], slot.lora_B.state_dict()["weight"]
        assert whole_A.shape == (2 * R, N) and whole_B.shape == (M, 2 * R)
        saved = slot_of(transposed)
        saved = AdapterSlot(**{**saved.__dict__, "lora_A": nn.Linear(N, 2 * R), "lora_B": nn.Linear(2 * R, M)})
        delta = S * whole_B @ whole_A
        torch.testing.assert_close(effective(slot_of(transposed)) + delta, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_subtract_uses_the_adapters_own_values(dtype):
    """B23: what is taken away is what the stored A and B give, up to one rounding of W."""
    slot = slot_of(dtype=dtype)
    before = slot.base_layer.weight.detach().clone()
    A0, B0 = start()
    offsets.write_subtract(slot, A0, B0)
    exact = before.double() - S * (B0.to(dtype).double() @ A0.to(dtype).double())
    assert slot.base_layer.weight.dtype is dtype
    epsilon = torch.finfo(dtype).eps
    assert ((slot.base_layer.weight.double() - exact).abs() <= epsilon * exact.abs() + 1e-6).all()


def test_anchor_cancels_exactly_in_half_precision():
    """B23: both halves see the same rounded numbers."""
    slot = slot_of(dtype=torch.bfloat16)
    offsets.write_anchor(slot, *start())
    A, B = slot.lora_A.weight.double(), slot.lora_B.weight.double()
    assert not (B @ A).abs().max() > 0


def test_only_the_trained_half_gets_a_gradient():
    slot = slot_of(bias=True)
    offsets.write_anchor(slot, *start())
    assert [name for name, _ in slot.lora_B.named_parameters()] == ["trained_half", "bias"]
    assert [name for name, _ in slot.lora_A.named_buffers()] == ["frozen"]
    x = torch.randn(5, N, dtype=torch.float64)
    dy = torch.randn(5, M, dtype=torch.float64)
    slot.lora_B(slot.lora_A(x)).backward(dy)
    B0, A0 = slot.lora_B.trained.detach(), slot.lora_A.trained.detach()
    torch.testing.assert_close(slot.lora_A.trained.grad, B0.T @ dy.T @ x)
    torch.testing.assert_close(slot.lora_B.trained.grad, dy.T @ x @ A0.T)


@pytest.mark.parametrize("kind", [Anchored, Shifted])
def test_state_dict_speaks_the_plain_weight(kind):
    slot, other = slot_of(bias=True), slot_of(bias=True)
    for each in (slot, other):
        offsets.write_none(each, *start())
        offsets.freeze_copy(each, kind, each.lora_A.weight.detach(), each.lora_B.weight.detach())
    with torch.no_grad():
        slot.lora_A.trained.add_(1)
        slot.lora_B.bias.add_(1)
    for name in ("lora_A", "lora_B"):
        state = getattr(slot, name).state_dict()
        assert set(state) == ({"weight"} if name == "lora_A" else {"weight", "bias"})
        for assign in (False, True):
            getattr(other, name).load_state_dict(state, assign=assign)
            assert torch.equal(getattr(other, name).trained, getattr(slot, name).trained)
            assert getattr(other, name).trained.requires_grad
            assert getattr(other, name).trained.untyped_storage().nbytes() == 8 * getattr(slot, name).trained.numel()
    assert torch.equal(effective(other), effective(slot))


@pytest.mark.parametrize("kind", [Anchored, Shifted])
def test_loading_something_else_is_refused(kind):
    slot = slot_of()
    offsets.write_none(slot, *start())
    offsets.freeze_copy(slot, kind, slot.lora_A.weight.detach(), slot.lora_B.weight.detach())
    before = copy.deepcopy(slot.lora_A.state_dict())
    for weight, match in (
        (torch.zeros(R, N), f"rank {R} and no frozen half"),
        (torch.zeros(2 * R, N + 1), r"saved shape is \(6, 22\), expected is \(6, 21\)"),
    ):
        with pytest.raises(RuntimeError, match=match):
            slot.lora_A.load_state_dict({"weight": weight})
        assert torch.equal(slot.lora_A.state_dict()["weight"], before["weight"])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        slot.lora_A.load_state_dict({})


def test_a_shifted_layer_takes_only_its_own_start():
    slot = slot_of()
    offsets.write_subtract(slot, *start())
    state = slot.lora_B.state_dict()
    state["weight"] = state["weight"].clone()
    state["weight"][:, R:] *= 1 + 1e-3
    with pytest.raises(RuntimeError, match=r"started elsewhere.*attach_anchor"):
        slot.lora_B.load_state_dict(state)


def test_without_a_start_the_frozen_half_is_zero():
    for kind in (Anchored, Shifted):
        slot = slot_of()
        before, A = effective(slot), slot.lora_A.weight.detach().clone()
        offsets.freeze_nothing(slot, kind)
        assert torch.equal(effective(slot), before)
        whole = slot.lora_A.state_dict()["weight"]
        assert torch.equal(whole[:R], A) and not whole[R:].any()
        slot.lora_A.load_state_dict({"weight": whole})


def test_anchor_comes_off_again():
    slot = slot_of(bias=True)
    parameters = [*slot.lora_A.parameters(), *slot.lora_B.parameters()]
    offsets.write_anchor(slot, *start())
    offsets.drop_anchor(slot)
    assert type(slot.lora_A) is nn.Linear and type(slot.lora_B) is nn.Linear
    now = [*slot.lora_A.parameters(), *slot.lora_B.parameters()]
    assert all(a is b for a, b in zip(now, parameters, strict=True))
    assert (slot.lora_A.out_features, slot.lora_B.in_features) == (R, R)
    assert set(vars(slot.lora_A)) == set(vars(nn.Linear(2, 2)))


def test_split_whole_takes_up_a_saved_adapter():
    slot = slot_of()
    offsets.write_anchor(slot, *start())
    with torch.no_grad():
        slot.lora_A.trained.add_(1)
    read = slot_of()
    read = AdapterSlot(
        **{
            **read.__dict__,
            "lora_A": nn.Linear(N, 2 * R, bias=False, dtype=torch.float64),
            "lora_B": nn.Linear(2 * R, M, bias=False, dtype=torch.float64),
        }
    )
    read.lora_A.load_state_dict(slot.lora_A.state_dict())
    read.lora_B.load_state_dict(slot.lora_B.state_dict())
    offsets.split_whole(read)
    assert torch.equal(read.lora_A.trained, slot.lora_A.trained) and torch.equal(read.lora_A.frozen, slot.lora_A.frozen)
    assert torch.equal(effective(read), effective(slot))


@pytest.mark.parametrize("transposed", [False, True])
def test_unshift_gives_the_weight_back(transposed):
    """B16."""
    slot = slot_of(transposed)
    weight = slot.base_layer.weight.detach().clone()
    offsets.write_subtract(slot, *start())
    with torch.no_grad():
        slot.lora_A.trained.add_(1)
    before = effective(slot)
    assert (slot.base_layer.weight - weight).norm() > 0.1 * weight.norm()
    offsets.unshift(slot)
    torch.testing.assert_close(slot.base_layer.weight.detach(), weight, rtol=0, atol=1e-14)
    torch.testing.assert_close(effective(slot), before, rtol=0, atol=1e-12)

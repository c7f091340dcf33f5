"""Updates in groups, as on a GPU, through the whole capture: the same factors, whatever the model does meanwhile."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import loraga
from loraga.capture import collector
from loraga.capture.run import Request, estimate_step
from loraga.distributed.ranks import Ranks
from loraga.estimators import Streaming

WIDTH = 352  # a sketch is smaller than the gradient


class InPlace(torch.autograd.Function):
    """Twice its input. Backward computes in the memory of the gradient it gets, as the RMSNorm of Liger does."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient.mul_(2)


class Block(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.how = how

    def inner(self, x):
        # the sum below hands one gradient to `c`, and afterwards to the op that overwrites it
        beside = InPlace.apply(x) if self.how == "in place" else x
        y = torch.tanh(self.a(x)) + torch.sigmoid(self.b(x))
        return self.c(y) + beside

    def forward(self, x):
        if self.how.startswith("checkpoint"):
            return checkpoint(self.inner, x, use_reentrant=self.how.endswith("reentrant"))
        return self.inner(x)


class Net(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(how) for _ in range(3))
        self.how = how

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        if self.how == "twice":
            x = self.blocks[0].a(x)
        return x


def loss_fn(model, batch):
    return model(batch).square().mean()


@pytest.fixture
def groups(monkeypatch):
    """Updates wait on the CPU, too. The numbers of layers that were updated together."""
    sizes: list[int] = []
    absorb = Streaming.absorb

    def counting(group, *args):
        sizes.append(len(group))
        return absorb(group, *args)

    monkeypatch.setattr(collector, "_waits", lambda device: True)
    monkeypatch.setattr(Streaming, "absorb", staticmethod(counting))
    return sizes


@pytest.mark.parametrize("how", ["plain", "in place", "twice", "checkpoint", "checkpoint reentrant"])
def test_factors_are_those_of_layers_alone(how, groups, monkeypatch):
    torch.manual_seed(0)
    model = Net(how)
    batches = [torch.randn(40, WIDTH, requires_grad=how.endswith("reentrant")) for _ in range(3)]
    together = loraga.estimate_factors(model, batches, rank=4, loss_fn=loss_fn)
    assert max(groups) == (3 if how.endswith("reentrant") else 9)
    assert groups.count(9) == (0 if how.endswith("reentrant") else 3)
    monkeypatch.setattr(collector, "_waits", lambda device: False)
    alone = loraga.estimate_factors(model, batches, rank=4, loss_fn=loss_fn)
    assert len(alone) == 9
    for name, factors in alone.items():
        assert torch.equal(factors.U, together[name].U) and torch.equal(factors.Vh, together[name].Vh)
        assert torch.equal(factors.S, together[name].S)


def test_a_batch_may_be_overwritten_after_backward(groups):
    """A callback that runs backward itself, as PEFT's does: the first layer's input is the batch."""
    model, batch, seen = nn.Linear(WIDTH, WIDTH), torch.empty(40, WIDTH), []

    def step():
        for seed in range(3):
            batch.copy_(torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(seed)))
            model(batch).square().mean().backward()
            seen.append(len(groups))
            batch.fill_(torch.nan)

    found = estimate_step(model, Request({"": 4}, {"": model}, loraga.InitConfig(), 0), step, Ranks())
    assert seen == [1, 2, 3] and found.skipped == {"": 0} and found.micro_batches == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_every_micro_batch_counts_with_checkpointing(reentrant):
    torch.manual_seed(0)
    model, plain = Net("checkpoint reentrant" if reentrant else "checkpoint"), Net("plain")
    plain.load_state_dict(model.state_dict())
    batches = [torch.randn(40, WIDTH, requires_grad=True) for _ in range(3)]
    ours = loraga.estimate_factors(model, batches, rank=4, loss_fn=loss_fn)
    truth = loraga.estimate_factors(plain, batches, rank=4, loss_fn=loss_fn)
    for name, factors in truth.items():
        assert torch.allclose(ours[name].S, factors.S, rtol=1e-4)


def test_a_step_that_goes_on_after_an_error(groups):
    """The pairs of the backward that raised are left out, and it counts as a micro-batch, as it does without groups."""
    model, first = Net("plain"), torch.randn(40, WIDTH)

    def step():
        hidden = model.blocks[0](first)
        hidden.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.blocks[1](hidden).square().mean().backward()
        first.fill_(torch.nan)
        loss_fn(model, torch.randn(40, WIDTH)).backward()

    targets = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    request = Request(dict.fromkeys(targets, 4), targets, loraga.InitConfig(), 0)
    found = estimate_step(model, request, step, Ranks())
    assert found.micro_batches == 2 and set(found.updates.values()) == {1} and found.skipped_batches == 0


def test_an_error_in_backward_leaves_nothing_behind(groups):
    model, batch = Net("plain"), torch.randn(40, WIDTH)

    def failing(model, batch):
        first, second, third = model.blocks
        y = first(batch)
        y.register_hook(lambda gradient: 1 / 0)
        return third(second(y)).square().mean()

    with pytest.raises(ZeroDivisionError):
        loraga.estimate_factors(model, [batch], rank=4, loss_fn=failing)
    assert not groups and not any(module._forward_hooks for module in model.modules())
    assert len(loraga.estimate_factors(model, [batch], rank=4, loss_fn=loss_fn)) == 9


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_start_alike(name, groups, monkeypatch):
    states = []
    for waits in (True, False):
        monkeypatch.setattr(collector, "_waits", lambda device, waits=waits: waits)
        states.append(tiny.init(tiny.build(name), tiny.batches(name)).state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])
    assert groups

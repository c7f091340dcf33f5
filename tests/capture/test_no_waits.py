"""Inside a backward pass the host neither reads a value of the device nor copies one to it.

The meta device stands for a GPU: its tensors have no values, and loraga computes there what it computes on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from meta import needs_meta_products
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from loraga.capture import collector
from loraga.capture.collector import Collector
from loraga.config import InitConfig
from loraga.estimators import Dense, Streaming
from loraga.ops import reference

META = torch.device("meta")
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "item", "equal", "_unique2", "masked_select"}


class _NoHostData(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            raise AssertionError(f"data of the host: {func}")
        return func(*args, **(kwargs or {}))


class NoHostTraffic(TorchDispatchMode):
    """Fails where an op reads a value for the host, or moves data between the host and the device."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = 0
        self._functions = _NoHostData()

    def __enter__(self):
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self._functions.__exit__(*exc)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if func.namespace == "loraga":
            with self:
                return getattr(reference, name)(*args, **kwargs)
        if name in READS:
            raise AssertionError(f"the host waits for a value: {func}")
        out = func(*args, **kwargs)
        operands = [*args, *kwargs.values()]
        tensors = [t for t in torch.utils._pytree.tree_leaves((operands, out)) if isinstance(t, torch.Tensor)]
        if any(t.is_cpu and t.numel() for t in tensors):
            raise AssertionError(f"data of the host: {func} of {[(tuple(t.shape), t.device) for t in tensors]}")
        self.ops += 1
        return out


def test_the_mode_sees_reads_and_copies():
    for traffic in (
        lambda: bool(torch.zeros((), device=META)),
        lambda: torch.zeros(3, device=META).nonzero(),
        lambda: torch.tensor([1, 2], device=META),
        lambda: torch.zeros(3).to(META),
        lambda: torch.zeros(3, device=META).copy_(torch.zeros(3)),
    ):
        with pytest.raises(AssertionError, match="host"), NoHostTraffic():
            traffic()


def pair(m, n, dtype, tokens=64):
    return torch.empty(tokens, n, dtype=dtype, device=META), torch.empty(tokens, m, dtype=dtype, device=META)


@needs_meta_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"estimator": "dense"}, {"estimator": "dense", "buffer_dtype": "float32"}])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_updates_and_the_end_of_a_micro_batch(micro_batches, options, dtype, monkeypatch):
    """First and later micro-batches; layers alone and in groups, with sketches and with buffers."""
    monkeypatch.setattr(collector, "_waits", lambda device: True)
    shapes = {"a": (400, 360), "b": (400, 360), "c": (400, 360), "small": (64, 96)}
    watched = Collector(dict.fromkeys(shapes, 8), InitConfig(**options), micro_batches, False, 0, META)
    with torch.device(META):
        modules = {name: nn.Linear(n, m, dtype=dtype) for name, (m, n) in shapes.items()}
    with NoHostTraffic() as mode:
        for name in modules:
            watched.make(name, *shapes[name])
        for _ in range(micro_batches):
            for name, shape in reversed(shapes.items()):
                watched.on_pair(name, *pair(*shape, dtype))
            watched.flush()
            watched.next_micro_batch()
    kinds = [type(watched.estimators[name]) for name in shapes]
    assert kinds == ([Dense] * 4 if options else [Streaming] * 3 + [Dense])
    assert mode.ops > 20 * micro_batches
    assert watched.outcomes.updates == dict.fromkeys(shapes, micro_batches)

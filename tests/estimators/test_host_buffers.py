"""Host-offloaded buffers: the sums are right and every access is ordered, whatever the order of layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import Queue, Queues
from torch import nn

import loraga
from loraga.capture.collector import Collector
from loraga.estimators import Dense, LayerSpec, StagingRing, finish
from loraga.estimators.host_buffers import HostMemory

CPU = torch.device("cpu")
# (m, n) of buffers; with blocks of 2400 bytes: several blocks of rows, one exactly, much smaller, one row a block
SHAPES = [(50, 40), (15, 40), (7, 3), (6, 512)]
RING = 3 * 2400


def layers(ring: StagingRing | None, dtype: torch.dtype) -> list[Dense]:
    return [Dense(LayerSpec(f"layer{i}", m, n, 1, 0, CPU), dtype, ring) for i, (m, n) in enumerate(SHAPES)]


def values(layer: Dense) -> torch.Tensor:
    return layer._g if layer._ring is None else layer._ring.load(layer._host)


def feed(layer: Dense, kind: str, seed: int, scale: float) -> torch.Tensor:
    """One update: through a pair (also of no tokens), as a whole gradient, or either with a NaN."""
    m, n = layer.spec.m, layer.spec.n
    g = torch.Generator().manual_seed(seed)
    if kind in ("pair", "bad pair", "no tokens"):
        tokens = 0 if kind == "no tokens" else 5
        x, dy = torch.randn(tokens, n, generator=g), torch.randn(tokens, m, generator=g)
        if kind == "bad pair":
            dy[3, m - 1] = torch.nan
        return layer.update(x, dy, scale)
    gradient = torch.randn(n, m, generator=g).T  # not contiguous
    if kind == "bad gradient":
        gradient[m - 1, 0] = torch.inf
    return layer.add(gradient, scale)


KINDS = ("pair", "no tokens", "gradient", "bad pair", "bad gradient")
STEPS = st.lists(st.tuples(st.integers(0, len(SHAPES) - 1), st.sampled_from(KINDS)), max_size=12)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, dtype=st.sampled_from([torch.float32, torch.bfloat16]), join=st.integers(1, 5))
def test_any_order_of_layers_gives_the_sums_of_buffers_on_the_device_and_every_access_is_ordered(steps, dtype, join):
    plain = layers(None, dtype)
    with Queues() as queues:
        ring = StagingRing(CPU, RING, queues)
        staged = layers(ring, dtype)
        for i, (layer, kind) in enumerate(steps):
            here = feed(staged[layer], kind, i, 0.5)
            assert bool(here) == bool(feed(plain[layer], kind, i, 0.5)) == (not kind.startswith("bad"))
            if i % join == 0:
                ring.join()
        ring.close()
        for ours, theirs in zip(staged, plain, strict=True):
            # a product by rows may be summed in another order than the whole
            torch.testing.assert_close(
                values(ours), values(theirs), rtol=0.01 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
            )
    assert queues.races == []


@pytest.mark.parametrize("layer", range(len(SHAPES)))
def test_a_layer_hit_again_and_again(layer):
    plain = layers(None, torch.float32)[layer]
    with Queues() as queues:
        ring = StagingRing(CPU, RING, queues)
        staged = layers(ring, torch.float32)[layer]
        for i in range(7):
            feed(staged, "pair", i, 1.0)
            feed(plain, "pair", i, 1.0)
        torch.testing.assert_close(values(staged), values(plain), rtol=1e-5, atol=1e-5)
        ring.close()
    assert queues.races == []


@pytest.mark.parametrize("deaf", ["main", "fetch", "work", "store"])
def test_the_race_detector_notices_a_queue_that_waits_for_nothing(deaf, monkeypatch):
    wait = Queue.wait_event
    monkeypatch.setattr(Queue, "wait_event", lambda self, event: None if self.name == deaf else wait(self, event))
    with Queues() as queues:
        ring = StagingRing(CPU, RING, queues)
        staged = layers(ring, torch.float32)
        for i in range(8):
            feed(staged[i % 2], "pair", i, 1.0)
        ring.close()
        del ring
        for layer in staged:
            values(layer)
    assert queues.races


def test_what_an_update_reads_lives_until_the_callers_queue_is_behind_it(monkeypatch):
    """Without `keep`, the memory of x and dy would be handed out anew while the work queue still reads it."""
    monkeypatch.setattr(StagingRing, "_settle", lambda self, most: self._pending.clear())
    with Queues() as queues:
        ring = StagingRing(CPU, RING, queues)
        feed(layers(ring, torch.float32)[0], "pair", 0, 1.0)
    assert any("given back on main" in race for race in queues.races)


def test_the_device_holds_what_the_user_allows():
    ring = StagingRing(CPU, 10_000, Queues())
    assert 9_900 < ring.device_bytes <= 10_000
    assert sum(block.memory.nbytes for block in ring._blocks) == ring.device_bytes
    with pytest.raises(ValueError, match=r"'wide'.* a row .* 4000 bytes.*staging_bytes=10000.*at least 12048"):
        Dense(LayerSpec("wide", 5, 1000, 1, 0, CPU), torch.float32, ring)
    Dense(LayerSpec("wide", 5, 1000, 1, 0, CPU), torch.float32, StagingRing(CPU, 12048, Queues()))


def test_factors_from_host_memory_are_those_from_the_device():
    spec = LayerSpec("layer", 60, 50, 4, 3, CPU)
    ring = StagingRing(CPU, 3 * 2000, Queues())
    plain, staged = Dense(spec), Dense(spec, torch.float32, ring)
    for i in range(3):
        x, dy = torch.randn(30, 50), torch.randn(30, 60)
        plain.update(x, dy, 2.0**-i)
        staged.update(x, dy, 2.0**-i)
    assert staged.state_bytes == plain.state_bytes == 60 * 50 * 4
    ring.close()
    ours, theirs = (finish({"layer": layer}, {"layer": 3.0})["layer"] for layer in (staged, plain))
    assert torch.allclose(ours.factors.S, theirs.factors.S, rtol=1e-5)
    assert torch.allclose(ours.factors.U @ ours.factors.Vh, theirs.factors.U @ theirs.factors.Vh, atol=1e-4)
    assert ours.energy == pytest.approx(theirs.energy, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_in_host_memory_are_merged_over_ranks(dtype):
    """Two ranks, played in one process; one of them has seen nothing."""
    specs = [LayerSpec(f"layer{i}", 50, 40, 4, i, CPU) for i in range(2)]
    plain, empty = ([Dense(spec, dtype) for spec in specs] for _ in range(2))
    with Queues() as queues:
        rings = [StagingRing(CPU, RING, queues) for _ in range(2)]
        ranks = [[Dense(spec, dtype, ring) for spec in specs] for ring in rings]
        for i in range(4):
            for layer in (ranks[0][i % 2], plain[i % 2]):
                feed(layer, "pair", i, 1.0)
        for ring in rings:
            ring.close()
        for group in (ranks, (plain, empty)):
            for parts in zip(*(Dense.merging(rank, 0.5) for rank in group), strict=True):
                total = sum(parts)
                for part in parts:
                    part.copy_(total)
        for rank in (*ranks, empty):
            for ours, theirs in zip(rank, plain, strict=True):
                assert values(ours).abs().max() > 0
                torch.testing.assert_close(values(ours), values(theirs), rtol=0.02, atol=1e-2)
    assert queues.races == []


def test_a_buffer_is_overwritten_behind_what_is_on_its_way():
    with Queues() as queues:
        ring = StagingRing(CPU, RING, queues)
        staged, plain = layers(ring, torch.float32)[0], layers(None, torch.float32)[0]
        feed(staged, "pair", 0, 1.0)
        ring.store(staged._host, torch.ones(*SHAPES[0]))
        plain._g.fill_(1.0)
        for layer in (staged, plain):
            feed(layer, "pair", 1, 1.0)
        ring.close()
        torch.testing.assert_close(values(staged), values(plain), rtol=1e-5, atol=1e-5)
    assert queues.races == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: ordering is checked by a race detector above")
def test_on_a_gpu_the_sums_are_those_of_buffers_on_the_device():
    device = torch.device("cuda", torch.cuda.current_device())
    spec = [LayerSpec(f"layer{i}", 1024, 2048, 4, 0, device) for i in range(6)]
    ring = StagingRing(device, 3 * 2**20)
    plain, staged = [Dense(s) for s in spec], [Dense(s, torch.float32, ring) for s in spec]

    def updates(order: list[int]) -> int:
        """Bytes on the device after one update of each layer in `order`."""
        for i in order:
            x, dy = torch.randn(256, 2048, device=device), torch.randn(256, 1024, device=device)
            plain[i].update(x, dy)
            staged[i].update(x, dy)
        ring.join()
        del x, dy
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    held = updates([0])  # with the workspaces that cuBLAS takes once for each stream
    assert updates([1, 2, 3, 4, 5, 5, 4, 0, 0, 2]) - held < 2**20  # an x takes twice that, a buffer eight times
    for ours, theirs in zip(staged, plain, strict=True):
        torch.testing.assert_close(values(ours), values(theirs), rtol=1e-4, atol=1e-3)
    ring.close()


@pytest.mark.parametrize("broken", [False, True])
def test_estimation_through_a_ring(broken, monkeypatch):
    """The loader writes every batch into one tensor: what is on its way must be done with the last one by then."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Conv1d(30, 25, 1))
    names, rings, queues = ["0", "2"], [], Queues()
    x = torch.empty(4, 20)

    def loader():
        for i in range(5):
            if broken and i == 3:
                raise RuntimeError("the disk is gone")
            yield x.copy_(torch.randn(4, 20, generator=torch.Generator().manual_seed(i)))

    def loss(model, batch):
        return model[2](model[1](model[0](batch)).unsqueeze(-1)).square().sum()

    def ring(collector, device):
        if device not in collector._rings:
            rings.append(StagingRing(device, 3 * 1000, queues))
            collector._rings[device] = rings[-1]
        return collector._rings[device]

    plain = {} if broken else loraga.estimate_factors(model, map(torch.clone, loader()), names, 3, loss_fn=loss)
    monkeypatch.setattr(Collector, "_ring", ring)
    with queues:
        if broken:
            with pytest.raises(RuntimeError, match="disk"):
                loraga.estimate_factors(model, loader(), names, 3, estimator="dense", loss_fn=loss)
        else:
            found = loraga.estimate_factors(model, loader(), names, 3, estimator="dense", loss_fn=loss)
    assert queues.races == [] and len(rings) == 1 and not rings[0]._blocks and not rings[0]._pending
    for name, factors in plain.items():
        assert torch.allclose(found[name].S, factors.S, rtol=1e-3)


def test_buffers_of_a_large_model_waste_little_memory(monkeypatch):
    """Llama-2-7B in bfloat16: torch rounds every piece of pinned memory up to a power of two."""
    block = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    shapes, pieces = 32 * block, []

    def meta(size, **options):
        pieces.append(size)
        return torch.empty(size, dtype=torch.uint8, device="meta")

    total = sum(2 * m * n for m, n in shapes)
    memory = HostMemory(pinned=False)
    memory._free = torch.empty(0, dtype=torch.uint8, device="meta")
    monkeypatch.setattr(torch, "zeros", meta)
    memory.reserve(total)
    taken = [memory.take(m, n, torch.bfloat16) for m, n in shapes]
    assert sum(1 << (2 * m * n - 1).bit_length() for m, n in shapes) > 1.3 * total
    assert all(size.bit_count() == 1 for size in pieces) and sum(pieces) < 1.15 * total
    assert [tuple(t.shape) for t in taken] == shapes


@pytest.mark.parametrize("total", [0, 10_000, 10**6])
def test_buffers_do_not_overlap(total):
    memory = HostMemory(pinned=False)
    memory.reserve(total)
    buffers = [memory.take(m, n, dtype) for m, n in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    assert not any(buffer.any() for buffer in buffers)
    for i, buffer in enumerate(buffers):
        buffer.fill_(i + 1)
        assert buffer.is_contiguous() and buffer.data_ptr() % 64 == 0
    assert all((buffer == i + 1).all() for i, buffer in enumerate(buffers))

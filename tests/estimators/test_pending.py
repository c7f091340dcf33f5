"""Pairs that wait for others of their shape: which are absorbed together, and when."""

from __future__ import annotations

import pytest
import torch
from micro_batches import CPU, stream

from loraga.estimators import WORKING_STATES, LayerSpec, Pending, Streaming, pair_bytes
from loraga.plan.dry_run import DryRun

M, N = 300, 220


def layers(count: int, m: int = M, n: int = N, first: int = 0) -> list[Streaming]:
    specs = [LayerSpec(f"layer {first + i}", m, n, 4, first + i, CPU) for i in range(count)]
    return Streaming.together(specs, 4)


def pair(seed: int, m: int = M, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    return stream(1, m=m, n=n, seed=seed)[0]


def labels(outcomes) -> list[list[object]]:
    return [names for names, _ in outcomes]


def test_neighbours_are_absorbed_together_in_any_order():
    """Backward reaches the last layer first; a layer that is left out divides its group."""
    group, pending = layers(6), Pending()
    for i in (5, 3, 4, 0, 1):
        assert pending.add(i, group[i], *pair(i)) == []
    assert len(pending) == 5
    outcomes = pending.flush()
    assert labels(outcomes) == [[0, 1], [3, 4, 5]] and len(pending) == 0
    assert all(finite.all() for _, finite in outcomes)
    for i in (0, 1, 3, 4, 5):
        alone = Streaming(group[i].spec, 4)
        alone.update(*pair(i))
        assert torch.equal(group[i].state[1], alone.state[1])
    assert not group[2].state[1].any()


def test_shapes_dtypes_and_first_updates_are_kept_apart():
    group, others, pending = layers(4), layers(2, M + 40, N, first=4), Pending()
    group[0].update(*pair(9))  # no longer empty
    for i in range(4):
        x, dy = pair(i)
        pending.add(i, group[i], *((x, dy) if i < 3 else (x.bfloat16(), dy.bfloat16())))
    for i, other in enumerate(others):
        pending.add(4 + i, other, *pair(i, M + 40, N))
    assert sorted(labels(pending.flush())) == [[0], [1, 2], [3], [4, 5]]


def test_a_poisoned_pair_is_left_out_alone():
    group, pending = layers(3), Pending()
    for i in range(3):
        x, dy = pair(i)
        pending.add(i, group[i], x, dy * (torch.nan if i == 1 else 1.0))
    ((names, finite),) = pending.flush()
    assert names == [0, 1, 2] and finite.tolist() == [True, False, True]


def test_a_layer_that_is_called_again_is_updated_first():
    group, pending = layers(2), Pending()
    pending.add("a", group[0], *pair(0))
    pending.add("b", group[1], *pair(1))
    assert labels(pending.add("c", group[0], *pair(2))) == [["a", "b"]]
    assert labels(pending.flush()) == [["c"]]
    alone = Streaming(group[0].spec, 4)
    alone.update(*pair(0))
    alone.update(*pair(2))
    assert torch.equal(group[0].state[1], alone.state[1])


def test_the_largest_group_makes_room():
    small, large = layers(5), layers(1, M + 40, first=5)
    waiting = 4 * pair_bytes(*pair(0)) + pair_bytes(*pair(0, M + 40))
    pending = Pending(waiting + WORKING_STATES * 4 * small[0].state_bytes)
    for i in range(4):
        assert pending.add(i, small[i], *pair(i)) == []
    assert pending.add(5, large[0], *pair(0, M + 40)) == []
    assert labels(pending.add(4, small[4], *pair(4))) == [[0, 1, 2, 3]] and len(pending) == 2


def test_a_layer_that_is_called_twice_and_a_new_one_are_kept_apart():
    """The new one is a neighbour, whose state is empty."""
    group, pending = layers(2), Pending()
    for label, i in (("a", 1), ("b", 1), ("c", 0)):
        pending.add(label, group[i], *pair(ord(label)))
    assert sorted(labels(pending.flush())) == [["b"], ["c"]]
    for i, seeds in ((0, "c"), (1, "ab")):
        alone = Streaming(group[i].spec, 4)
        for seed in seeds:
            alone.update(*pair(ord(seed)))
        assert torch.equal(group[i].state[1], alone.state[1])


def test_an_input_that_is_changed_while_it_waits_is_an_error():
    group, pending = layers(1), Pending()
    x, dy = pair(0)
    pending.add("up_proj", group[0], x, dy)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="input of layer up_proj was changed in place"):
        pending.flush()


def test_an_input_that_layers_share_counts_once():
    x, dy = pair(0)
    for inputs, waiting in (((x, x[:], x.view_as(x)), 3), ((x, x.clone(), x.clone()), 1)):
        group = layers(3)
        working = WORKING_STATES * 3 * group[0].state_bytes
        pending = Pending(pair_bytes(x, dy) + 2 * pair_bytes(None, dy) + working)
        for i, own in enumerate(inputs):
            pending.add(i, group[i], own, dy)
        assert len(pending) == waiting


def test_a_shared_input_counts_as_long_as_one_layer_holds_it():
    """Also after the group that it came with is absorbed."""
    wide, others = layers(1, M + 400), layers(2, first=1)
    x, dy = pair(0)
    pending = Pending()
    pending.add(0, wide[0], x, torch.randn(len(x), M + 400))
    pending.add(1, others[0], x, dy)
    pending._absorb(next(iter(pending._groups)))
    working = WORKING_STATES * 2 * others[0].state_bytes
    pending._limit = pair_bytes(x, dy) + pair_bytes(x.clone(), dy) + working
    assert pending.add(2, others[1], x.clone(), dy) == []
    pending._limit -= 1
    assert not pending._has_room(next(iter(pending._groups)), x.clone(), dy[:0], 0)


def test_a_large_pair_does_not_wait():
    group = layers(2)
    x, dy = pair(0)
    pending = Pending(2 * (pair_bytes(x, dy) + WORKING_STATES * group[0].state_bytes) - 1)
    assert labels(pending.add(0, group[0], x, dy)) == [[0]] and len(pending) == 0


def test_what_waits_is_a_copy():
    group, pending = layers(1), Pending()
    x, dy = pair(0)
    pending.add(0, group[0], x, dy)
    dy.zero_()
    pending.flush()
    assert group[0].state[1].norm() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "rank"), [(4096, 4096, 16), (11008, 4096, 8), (4096, 14336, 16), (4096, 4096, 128)])
@pytest.mark.parametrize("tokens", [128, 1024])
def test_an_update_takes_no_more_than_is_counted(tokens, m, n, rank, dtype):
    """On the meta device, where what a GPU does is counted: a group of four layers, first and later micro-batches."""
    meta = torch.device("meta")
    group = Streaming.together([LayerSpec(str(i), m, n, rank, i, meta) for i in range(4)], 4)
    xs, dys = ([torch.empty(tokens, size, dtype=dtype, device=meta) for _ in group] for size in (n, m))
    for _ in range(2):
        with DryRun() as run, run.aside() as cost:
            Streaming.absorb(group, xs, dys)
        assert cost.extra <= WORKING_STATES * sum(streaming.state_bytes for streaming in group)

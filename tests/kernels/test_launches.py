"""How much a GPU is given to do for one update of each layer: operations of torch, and launches of Triton kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from meta import needs_meta_products

from loraga.kernels.dev import workloads
from loraga.kernels.dev.steps import Steps, counted

pytestmark = needs_meta_products
BF16 = torch.bfloat16


def later_update(
    count: int, rank: int = 16, dtype: torch.dtype = BF16, layer: workloads.Layer = workloads.LLAMA_7B[0]
) -> Steps:
    """The steps of an update of `count` layers that are absorbed together; not the first, which starts from nothing."""
    case = workloads.Case(layer, 1024, dtype, rank, count=count)
    estimators = case.estimators()
    case.update(estimators)
    with counted() as steps:
        case.update(estimators)
    return steps


@pytest.mark.parametrize("rank", [8, 128])
@pytest.mark.parametrize("layer", workloads.LLAMA_7B, ids=lambda layer: layer.name)
@pytest.mark.parametrize(("count", "most"), [(8, 12), (32, 8)])
def test_operations_of_a_layer_in_a_group(count, most, layer, rank):
    steps = later_update(count, rank, layer=layer)
    assert len(steps.steps) <= most * count, steps.counts()


def test_four_products_grow_with_the_layers_and_nothing_else():
    few, many = later_update(4).counts(), later_update(8).counts()
    assert many - few == {"mm": 4 * 4} and not few - many


def test_a_layer_alone_takes_more():
    """So that the bounds above could fail."""
    assert len(later_update(1).steps) > 12


def test_what_is_no_launch_is_not_counted():
    with counted() as steps:
        x = torch.empty(8, 4, device="meta")
        x[1:].view(-1).t()
        x.new_empty(3)
    assert not steps.steps and steps.views >= 4
    with counted() as steps:
        (x @ x.t()).add_(1)
    assert [(s.name, s.flops, s.bytes) for s in steps.steps] == [("mm", 512, 512), ("add_", 0, 512)]
    half, total = x.to(BF16), torch.empty(8, 8, device="meta")
    with counted() as steps:
        torch.addmm(total, half, half.t(), out_dtype=torch.float32, alpha=2.0, out=total)
        torch.bmm(half[None], half.t()[None], out_dtype=torch.float32)
    assert [(s.name, s.flops, s.bytes) for s in steps.steps] == [("addmm", 512, 640), ("bmm", 512, 384)]


@pytest.mark.slow
def test_launches_of_an_update():
    """On the Triton path: kernels of loraga by name, and the operations of torch that are left."""
    program = """
import json
import torch
from loraga.kernels.dev import workloads
from loraga.kernels.dev.steps import counted
case = workloads.Case(workloads.LLAMA_7B[0], 1024, torch.bfloat16, 16, count=8)
estimators = case.estimators()
case.update(estimators)
with counted(90) as steps:
    case.update(estimators)
kinds = {kind: [step.name for step in steps.steps if step.kind == kind] for kind in ("triton", "native", "torch")}
print(json.dumps(kinds))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    kinds = json.loads(done.stdout)
    one_pass = ["_gram_kernel", "_product_kernel"]  # V takes one, the new Q two
    assert kinds["native"] == ["cholesky_inverse"] * 3
    assert [name for name in kinds["triton"] if name != "_sum_splits_kernel"] == [
        *("_norms_kernel", *one_pass),
        *("_norms_kernel", *one_pass, *one_pass),
        *("_finite_kernel", "_commit_kernel"),
    ]
    assert kinds["triton"].count("_sum_splits_kernel") <= 3
    assert sum(map(len, kinds.values())) <= 8 * 8, kinds

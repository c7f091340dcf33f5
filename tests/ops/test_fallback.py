"""A kernel that cannot be launched: torch takes over on operands that nobody has touched, with one warning."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_operands import DEVICE, needs_device, operand
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from loraga.kernels import random
from loraga.ops import reference, triton
from loraga.ops.device_facts import DeviceFacts
from loraga.ops.selection import Selection

pytestmark = needs_device
HERE = torch.device(DEVICE)
KERNELS = Path(random.__file__).parent
FACTS = DeviceFacts("Some GPU", (9, 0), "580.1", "2.13.0", "3.7.1")
TOO_LARGE = OutOfResources(300_000, 232_448, "shared memory")


def operands(op: str) -> list[Any]:
    """Arguments with which the launcher of `op` makes all the launches that it has."""
    if op == "test_matrix_":
        return [torch.full((9, 8), torch.nan, device=HERE), 5]
    if op == "basis":
        return [operand(2, 48, 16)]
    if op == "commit_":
        state = [operand(2, 33, 16), operand(2, 16, 40), operand(2, 33, 4)]
        return [*state, operand(2, 33, 16, seed=1), operand(2, 16, 40, seed=1), operand(2, 20, 33, seed=1).mT]
    if op == "accumulate_":  # few blocks and many tokens: the sum is cut
        return [operand(16, 32), operand(600, 32, seed=1), operand(600, 16, seed=2), 0.5]
    return [operand(2, 45, 1500), 16, 0, [3, 4]]  # the sum over columns is cut; without the many launches of `basis`


def copied(args: list[Any]) -> list[Any]:
    return [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]


@contextmanager
def launches(fails_at: int | None = None, error: Exception = TOO_LARGE) -> Iterator[list[Any]]:
    """The kernels that are launched; the one with the number `fails_at` raises `error` instead."""
    seen: list[Any] = []
    kind = type(random._fill_kernel)
    launcher = kind.__getitem__

    def counted(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            seen.append(kernel)
            if len(seen) - 1 == fails_at:
                raise error
            return launcher(kernel, grid)(*args, **options)

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "__getitem__", counted)
        yield seen


@pytest.fixture
def selection(monkeypatch):
    """All kernels are on, on this device."""
    monkeypatch.delenv("LORAGA_TRITON", raising=False)
    chosen = Selection(triton.LAUNCHERS, lambda op, device: "", lambda device: FACTS, lambda facts, ops: {})
    monkeypatch.setattr(triton, "selection", chosen)
    return chosen


def tensors(result: Any) -> list[torch.Tensor]:
    return [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("op", triton.LAUNCHERS)
def test_a_failed_launch_leaves_the_operands_as_they_were(op):
    """At whichever launch a kernel fails: what the reference gets next is what the kernel got."""
    before = operands(op)
    with launches() as seen:
        triton.launcher(op)(*copied(before))
    assert seen, "this launcher launches nothing"
    for number in range(len(seen)):
        args = copied(before)
        with launches(number), pytest.raises(OutOfResources):
            triton.launcher(op)(*args)
        for arg, original in zip(args, before, strict=True):
            if isinstance(arg, torch.Tensor):
                torch.testing.assert_close(arg, original, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", triton.LAUNCHERS)
def test_torch_takes_over_with_one_warning(op, selection):
    args = operands(op)
    expected_args = copied(args)
    expected = getattr(reference, op)(*expected_args)
    with launches(0), pytest.warns(UserWarning) as seen:
        result = triton.run(op, HERE, *args)
    (warning,) = seen
    assert re.match(
        rf"The Triton kernel of {op} cannot be used on {HERE} \(OutOfResources: out of resource: shared memory",
        str(warning.message),
    )
    for one, other in zip(tensors(result), tensors(expected), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(args, expected_args, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    with launches() as later, warnings.catch_warnings():
        warnings.simplefilter("error")
        triton.run(op, HERE, *operands(op))
    assert not later, "the kernel is not tried again"
    assert selection.report([HERE])[str(HERE)][op].startswith("torch: OutOfResources")


def test_every_kernel_of_the_package_runs_by_default(selection):
    """None is left that no op launches."""
    files = [importlib.import_module(f"loraga.kernels.{path.stem}") for path in KERNELS.glob("[a-z]*.py")]
    kind = type(random._fill_kernel)
    kernels = {
        f"{file.__name__}.{name}"
        for file in files
        for name, value in vars(file).items()
        if isinstance(value, kind) and name.endswith("_kernel") and value.fn.__module__ == file.__name__
    }
    assert "loraga.kernels.random._fill_kernel" in kernels
    with launches() as seen:
        for op in triton.LAUNCHERS:
            triton.run(op, HERE, *operands(op))
    assert {f"{kernel.fn.__module__}.{kernel.fn.__name__}" for kernel in seen} == kernels


def test_the_kernel_runs_where_nothing_is_wrong(selection):
    out = torch.empty(9, 8, device=HERE)
    with launches() as seen:
        triton.run("test_matrix_", HERE, out, 5)
    assert seen == [random._fill_kernel]


@pytest.mark.parametrize("error", [CompilationError("tl.dot(x)", None, "no such layout"), PTXASError("no such arch")])
def test_what_cannot_be_compiled_falls_back(selection, error):
    with launches(0, error), pytest.warns(UserWarning, match="The Triton kernel of test_matrix_"):
        triton.run("test_matrix_", HERE, torch.empty(9, 8, device=HERE), 5)


@pytest.mark.parametrize("error", [ValueError("a mistake of ours"), torch.OutOfMemoryError("no memory"), KeyError(1)])
def test_other_errors_are_shown(selection, error):
    with launches(0, error), pytest.raises(type(error)):
        triton.run("test_matrix_", HERE, torch.empty(9, 8, device=HERE), 5)
    assert selection.chosen("test_matrix_", HERE).runs == "triton"


def test_a_kernel_that_was_asked_for_shows_its_error(selection, monkeypatch):
    monkeypatch.setenv("LORAGA_TRITON", "1")
    with launches(0), pytest.raises(OutOfResources):
        triton.run("test_matrix_", HERE, torch.empty(9, 8, device=HERE), 5)


def test_nothing_is_launched_where_torch_is_asked_for(selection, monkeypatch):
    monkeypatch.setenv("LORAGA_TRITON", "0")
    with launches() as seen:
        triton.run("test_matrix_", HERE, torch.empty(9, 8, device=HERE), 5)
    assert not seen


@pytest.mark.slow
def test_a_broken_triton_is_a_reason_like_any_other():
    """Its import fails when a kernel is used for the first time."""
    code = (
        "import sys, torch\n"
        "from loraga.ops import first_use, triton\n"
        "assert 'triton' not in sys.modules, 'importing the ops must not import Triton'\n"
        "sys.modules['triton'] = None\n"
        "print(first_use.problem('test_matrix_', lambda *a: triton.launcher('test_matrix_')(*a), torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "ModuleNotFoundError: import of triton halted" in done.stdout, done.stderr

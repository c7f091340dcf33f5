"""The caller's precision settings stay out of our arithmetic, and are as before afterwards."""

from __future__ import annotations

import threading

import pytest
import torch

from loraga.linalg.precision import own_precision, without_tf32

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(params=["as it is", "allow_tf32", "high", "medium"])
def setting(request):
    """A way in which users allow TF32; yields what reads the setting, which needs no GPU."""
    before = torch.get_float32_matmul_precision()
    if request.param == "allow_tf32":
        MATMUL.allow_tf32 = True
    elif request.param != "as it is":
        torch.set_float32_matmul_precision(request.param)

    def read() -> tuple[bool, str]:
        return MATMUL.allow_tf32, torch.get_float32_matmul_precision()

    yield read
    torch.set_float32_matmul_precision(before)


def allowed() -> bool:
    name = "fp32_precision" if hasattr(MATMUL, "fp32_precision") else "allow_tf32"
    return getattr(MATMUL, name) not in ("ieee", False)


def test_tf32_is_off_inside_and_the_setting_as_before(setting):
    before = setting()
    with own_precision(torch.device("cuda")):
        assert not allowed()
        with without_tf32():
            assert not allowed()
        assert not allowed()
    assert setting() == before
    with pytest.raises(KeyError), without_tf32():
        raise KeyError
    assert setting() == before


def test_threads_that_overlap_leave_the_setting_as_it_was(setting):
    """Backward runs a thread per device: A enters, B enters, A leaves, B leaves."""
    before = setting()
    inside, leave, left = threading.Event(), threading.Event(), threading.Event()

    def other() -> None:
        with without_tf32():
            inside.set()
            leave.wait(10)
        left.set()

    first = without_tf32()
    first.__enter__()
    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    first.__exit__(None, None, None)
    assert not allowed()
    leave.set()
    assert left.wait(10)
    thread.join()
    assert setting() == before


def test_autocast_does_not_reach_inside():
    a = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with own_precision(a.device):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16

"""Every kernel and tuning entry compiles for every architecture of the table, without spills, within shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import triton

from loraga._version import release_of
from loraga.kernels import tuning
from loraga.kernels.dev import aot, command

pytestmark = pytest.mark.slow

compiled_as_promised = pytest.mark.skipif(
    release_of(triton.__version__) < (3, 6),
    reason="the compiler of this Triton spills where that of 3.6 and 3.7 does not",
)


def run(program: str) -> None:
    """A Python program in a process that does not interpret kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@compiled_as_promised
@pytest.mark.timeout(1200)  # about 40 s on two idle cores
@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
def test_all_builds_fit(arch):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "loraga.kernels.dev", "compile", str(arch)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(rf"^(.+?) +{arch} +\d+ +\d+ +\d+ +(\d+)$", done.stdout, re.MULTILINE)
    assert [label.strip() for label, _ in rows] == [build.label for build in aot.builds(arch)]
    assert all(spilled == "0" for _, spilled in rows)


@compiled_as_promised
@pytest.mark.timeout(600)  # about 15 s
@pytest.mark.parametrize("arch", [86, 120])
def test_what_the_table_gives_to_cards_of_less_shared_memory_fits(arch):
    """One build of each kernel and entry; the few registers that some spill there cost time and no more."""
    run(f"""
from loraga.kernels.dev import aot
first = {{}}
for build in aot.builds({arch}):
    first.setdefault((build.kernel.__name__, *build.config.items()), build)
assert len(first) > 25
for build in first.values():
    usage = aot.compile_build(build, {arch})
    assert usage.shared <= aot.SHARED_LIMIT[{arch}], usage
""")


def test_sizes_and_strides_of_one_compile():
    """Triton makes an integer argument of 1 a constant, of which not everything can be asked that a number can."""
    run("""
from dataclasses import replace
from loraga.kernels.dev import aot
kernels = {build.kernel: build for build in aot.builds(90)}
for build in kernels.values():
    ones = [name for name, kind in build.signature.items() if kind in ("i32", "i64") and name != "seed"]
    signature = {name: kind for name, kind in build.signature.items() if name not in ones}
    aot.compile_build(replace(build, signature=signature, constants=build.constants | dict.fromkeys(ones, 1)), 90)
""")


def test_labels_are_unique():
    labels = [build.label for build in aot.builds(90)]
    assert len(labels) == len(set(labels))


def test_every_entry_of_the_table_is_built():
    for arch in tuning.ARCHITECTURES:
        built = [build.config for build in aot.builds(arch)]
        for kernel, widths in tuning.table()["kernels"].items():
            for bits, rows in widths.items():
                for name in (str(arch), tuning.RAGGED):
                    for entry in rows[name].values():
                        assert entry in built, f"{kernel} {bits} {name}: {entry}"


def test_a_spill_is_seen_and_fails():
    usage = aot.Usage("name", 90, 4, 255, 1000, 8)
    assert not usage.fits
    assert not aot.Usage("name", 80, 4, 255, 100 * 1024, 0).fits
    assert aot.Usage("name", 90, 4, 255, 100 * 1024, 0).fits


def test_an_unknown_architecture_is_named(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that it is put back after the command has set it
    assert command.main(["75"]) == 2
    assert "75" in capsys.readouterr().err


def test_compiling_while_interpreted_is_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_number(90, 0)


def test_resources_come_from_the_machine_code():
    """A kernel made to spill is reported as spilling, so that zeros above mean something."""
    run("""
from loraga.kernels.dev import aot
from loraga.kernels.thin import _fold_build
blocks = dict(BLOCK_M=256, BLOCK_T=64, BLOCK_K=256, BLOCK_I=32)
build = _fold_build("x", "bf16", True, dict(blocks, num_warps=4, num_stages=2), True)
usage = aot.compile_build(build, 90)
assert usage.spilled > 0 and not usage.fits, usage
""")

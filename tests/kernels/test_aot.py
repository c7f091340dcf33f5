"""Every kernel and tuning entry compiles for every architecture of the table, without spills, within shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from loraga.kernels import __main__ as command
from loraga.kernels import aot, tuning


@pytest.mark.timeout(1200)  # about 40 s on two idle cores
@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
def test_all_builds_fit(arch):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "loraga.kernels", "compile", str(arch)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(rf"^(.+?) +{arch} +\d+ +\d+ +\d+ +(\d+)$", done.stdout, re.MULTILINE)
    assert [label.strip() for label, _ in rows] == [build.label for build in aot.builds(arch)]
    assert all(spilled == "0" for _, spilled in rows)


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
    program = """
from loraga.kernels import aot
from loraga.kernels.thin import _fold_build
blocks = dict(BLOCK_M=256, BLOCK_T=64, BLOCK_K=256, BLOCK_I=32)
build = _fold_build("x", "bf16", True, dict(blocks, num_warps=4, num_stages=2), True)
usage = aot.compile_build(build, 90)
assert usage.spilled > 0 and not usage.fits, usage
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

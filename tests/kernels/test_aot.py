"""Launches of real layers, recorded without a GPU, and the machine code that Triton makes of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import triton
from meta import needs_meta_products

from loraga._version import release_of
from loraga.kernels.dev import aot, command, devices, launches, workloads
from loraga.kernels.dev.sass import Code

pytestmark = pytest.mark.slow

ARCHITECTURES = (80, 90, 120)  # of six that `python -m loraga.kernels.dev` compiles for
# one of each kind: wide rows of a large layer, float32 rows, rows that begin at any address
SAMPLE = (
    "8 x 8B gate, 1024 tokens, r 16, bf16, streaming",
    "8B gate, 1024 tokens, r 16, bf16, dense bf16",
    "3 x MiniLM up, 67 tokens, r 8, fp32, dense fp32",
    "3 x ragged, 67 tokens, r 8, bf16, dense bf16",
)
# Triton makes an integer of 1 a constant, of which not everything can be asked that a number can
SINGLE = "single, 1 tokens, r 1, fp32, dense bf16"
WIDE, FLOAT32, RAGGED = SAMPLE[1:4]
# bytes a thread that may be spilled: ptxas takes few registers on sm_120, and spills some where it need not
SPILLED = {80: 0, 90: 0, 120: 16}
# so much anywhere by a Triton that the block sizes were not chosen with (3.8 spills 8 bytes on sm_80)
SPILLED_BY_OTHERS = 16

compiled_as_promised = pytest.mark.skipif(
    release_of(triton.__version__) < (3, 6),
    reason="the compiler of this Triton spills where that of 3.6 and 3.7 does not",
)


def run(program: str, folder: Path) -> Any:
    """What a Python program prints as JSON, in a process that does not interpret kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def compiled(cache):
    """Rows of the table (`aot.Usage`) of the cases of SAMPLE for ARCHITECTURES."""
    return run(
        f"""
import inspect, json
from dataclasses import asdict
from loraga.kernels.dev import aot, launches, workloads
multiply = {{name for module in launches.families() for name, value in vars(module).items()
            if name.endswith("_kernel") and "tl.dot(" in inspect.getsource(value.fn)}}
chosen = [case for case in workloads.cases() if case.label in {SAMPLE}]
assert len(chosen) == {len(SAMPLE)}, chosen
print(json.dumps([
    asdict(usage) | {{"faults": usage.faults, "multiplies": usage.kernel in multiply}}
    for usage in aot.compile_all({ARCHITECTURES}, chosen, every=False)
]))
""",
        cache,
    )


def named(row: dict[str, Any]) -> str:
    return f"{row['kernel']} sm_{row['arch']} {row['operands']}, {row['label']}: {row}"


@compiled_as_promised
@pytest.mark.timeout(600)
def test_every_binary_fits_and_none_spills(compiled):
    assert {row["arch"] for row in compiled} == set(ARCHITECTURES)
    own = release_of(triton.__version__) == (3, 7)
    for row in compiled:
        allowed = SPILLED[row["arch"]] if own else SPILLED_BY_OTHERS
        assert set(row["faults"]) <= {"spills registers"} and row["local"] <= allowed, named(row)


@compiled_as_promised
@pytest.mark.timeout(600)
def test_products_run_on_tensor_cores(compiled):
    """In every kernel with a `tl.dot`."""
    rows = [row for row in compiled if row["multiplies"]]
    assert len({row["kernel"] for row in rows}) >= 4
    assert not [named(row) for row in rows if row["tensor"] == 0]


@compiled_as_promised
@pytest.mark.timeout(600)
def test_rows_of_real_layers_are_loaded_wide_and_ahead_of_their_use(compiled):
    """16 bytes a thread, past the registers into shared memory, while the tensor cores are at the block before."""
    rows = [
        row for row in compiled if row["multiplies"] and row["label"] == WIDE and row["operands"].startswith("bf16")
    ]
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)
    for row in rows:
        assert 0 < row["loads"] == row["wide_loads"] == row["asynchronous"], named(row)
    narrow = [row for row in compiled if row["kernel"] == "_accumulate_kernel" and row["label"] == RAGGED]
    assert narrow and all(row["wide_loads"] == 0 for row in narrow)  # so that the zeros above could be seen


@needs_meta_products
def test_every_kernel_is_launched_by_a_case(cache):
    """A kernel that no layer reaches is not compiled, and is of no use."""
    found = run(
        """
import json
from loraga.kernels.dev import launches, workloads
from triton.runtime.jit import JITFunction
there = {name for module in launches.families() for name, value in vars(module).items()
         if isinstance(value, JITFunction) and name.endswith("_kernel")}
builds = {arch: workloads.builds(arch) for arch in (80, 90, 120)}
launched = {arch: sorted({build.launch.kernel for build in found}) for arch, found in builds.items()}
counts = [(len(found), sum(b.uses for b in found)) for found in (builds[90], workloads.builds(90, every=False))]
print(json.dumps([sorted(there), launched, counts]))
""",
        cache,
    )
    assert found[0] and all(kernels == found[0] for kernels in found[1].values())
    (every, launches_of_every), (one_of_each_kind, launches_of_kinds) = found[2]
    assert every > one_of_each_kind > len(found[0]) and launches_of_every == launches_of_kinds > every


def test_what_is_recorded_is_what_triton_would_compile(cache):
    """Alignment of addresses, integers that are divisible by 16, integers of 1, element types, options, grid."""
    first, shifted = run(
        """
import json
import torch
from loraga.kernels import random
from loraga.kernels.dev import launches
found = []
with launches.recorded(90, found.append):
    whole = torch.empty(64, 16, device="meta")
    random.fill(whole, 3)
    random.fill(whole.view(-1)[1:1], 3)
    random.fill(whole.view(-1)[1:], 3)
print(json.dumps([
    [one.kernel, one.signature, str(one.attributes), one.options["num_warps"], one.grid, one.numbers] for one in found
]))
""",
        cache,
    )
    assert first[0] == shifted[0] == "_fill_kernel" and first[3] == 4 and first[4] == shifted[4] == [1]
    assert first[1] == {"out_ptr": "*fp32", "seed": "i32", "total": "i32", "BLOCK": "constexpr"}
    assert first[5]["total"] == 1024 and shifted[5]["total"] == 1023
    divisible = [launch[2].count("tt.divisibility") for launch in (first, shifted)]
    assert divisible == [2, 0], (first, shifted)  # address and length; an empty matrix launches nothing


@pytest.mark.timeout(600)
def test_sizes_of_one_compile(cache):
    rows = run(
        f"""
import json
from loraga.kernels.dev import aot, workloads
chosen = [case for case in workloads.cases() if case.label == {SINGLE!r}]
print(json.dumps([usage.kernel for usage in aot.compile_all((90,), chosen)]))
""",
        cache,
    )
    assert "_accumulate_kernel" in rows and len(rows) > 6


def test_a_kernel_that_spills_is_seen(cache):
    """So that zeros above mean something."""
    usage = run(
        """
import json
from dataclasses import asdict, replace
from loraga.kernels.dev import aot, workloads
case = next(case for case in workloads.cases() if case.buffer is not None)
build = next(b for b in workloads.builds(80, [case]) if b.launch.kernel == "_accumulate_kernel")
places = {name: (i,) for i, name in enumerate(build.launch.signature)}
large = build.launch.constants | {places["BLOCK_M"]: 256, places["BLOCK_N"]: 256}
launch = replace(build.launch, constants=large, options=build.launch.options | {"num_warps": 4})
usage = aot.compile_build(replace(build, launch=launch), 80)
print(json.dumps(asdict(usage) | {"faults": usage.faults}))
""",
        cache,
    )
    assert usage["local"] > 0 and usage["spills"] > 0 and "spills registers" in usage["faults"]


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000fe40000000800 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;       /* 0x0 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64] ; /* 0x0 */
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R0 ; /* 0x0 */
        /*0040*/              @!P1 BRA 0x110 ;                            /* 0x0 */
        /*0050*/                   IMAD.WIDE.U32 R2, R4, 0x2, R2 ;        /* 0x0 */
        /*0060*/                   IADD3.X R3, R3, R5, RZ, P0, !PT ;      /* 0x0 */
        /*0070*/                   IMAD R3, R3, R5, RZ ;                  /* 0x0 */
        /*0080*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;       /* 0x0 */
        /*0090*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x0 */
        /*00a0*/               @P0 BRA 0x20 ;                             /* 0x0 */
        /*00b0*/                   BRA.U !UP0, 0xd0 ;                     /* 0x0 */
        /*00c0*/                   LD.E R4, desc[UR4][R2.64] ;            /* 0x0 */
        /*00d0*/                   STL [R1], R2 ;                         /* 0x0 */
        /*00e0*/                   REDUX.MIN.S32 UR4, R2 ;                /* 0x0 */
        /*00f0*/                   EXIT ;                                 /* 0x0 */
        /*0100*/                   NOP;                                   /* 0x0 */
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R0 ; /* 0x0 */
        /*0120*/              @!P1 BRA 0x110 ;                            /* 0x0 */
        /*0130*/                   BRA 0x50 ;                             /* 0x0 */
        /*0140*/                   BRA 0x140;                             /* 0x0 */
"""


def test_instructions_are_told_apart():
    code = Code.parse(LISTING)
    assert len(code.instructions) == 21
    counts = {
        name: code.count(lambda i, name=name: getattr(i, name))
        for name in ("is_global_load", "is_wide_load", "is_asynchronous", "is_tensor", "is_generic", "is_local")
    }
    assert list(counts.values()) == [3, 2, 1, 1, 1, 1], counts
    assert [i.name for i in code.instructions if i.is_wide_integer] == ["IMAD.WIDE.U32", "IADD3.X"]


def test_a_loop_is_what_can_be_entered_at_its_beginning_only():
    """The jump back from behind the end, where code waits for a barrier, begins no loop at 0x50."""
    loop = Code.parse(LISTING).main_loop
    assert [i.address for i in loop.instructions] == [*range(0x20, 0xB0, 0x10), 0x110, 0x120, 0x130]
    assert Code.parse("        /*0000*/                   EXIT ;\n").main_loop.instructions == ()


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "columns", "blocks"),
    [
        (90, 8, 128, 0, 0, 2),  # registers: 8 warps of 32 x 128
        (90, 8, 129, 0, 0, 1),  # of which a thread gets 8 at a time
        (90, 4, 16, 0, 0, 16),  # 64 warps
        (89, 4, 16, 0, 0, 12),  # 48 warps
        (90, 1, 16, 0, 0, 32),  # 32 blocks
        (90, 4, 32, 113 * 1024, 0, 2),  # each takes 1 KB besides
        (90, 4, 32, 114 * 1024, 0, 1),
        (86, 4, 32, 100 * 1024, 0, 0),  # more than one block may take
        (100, 4, 32, 0, 256, 2),  # tensor memory
    ],
)
def test_blocks_that_fit_on_a_multiprocessor(arch, warps, registers, shared, columns, blocks):
    assert devices.MULTIPROCESSORS[arch].resident(warps, registers, shared, columns) == blocks


def test_an_unknown_architecture_is_named(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that it is put back after the command has set it
    assert command.main(["75"]) == 2
    assert "75" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "words"), [({}, None), ({"local": 8}, "spills"), ({"generic": 1}, "generic")])
def test_the_table_names_what_is_wrong(change, words, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    numbers = dict.fromkeys((field.name for field in fields(aot.Usage)), 1) | {"local": 0, "spills": 0, "generic": 0}
    usage = aot.Usage(
        **numbers | {"kernel": "_fold_kernel", "label": "7B down", "operands": "bf16", "arch": 90} | change
    )
    monkeypatch.setattr(aot, "compile_all", lambda archs: iter([usage]))
    assert command.main(["90", "--json", str(tmp_path / "table.json")]) == (0 if words is None else 1)
    said = capsys.readouterr().out
    assert "sm_90" in said and re.search(r"^fold .* bf16: 7B down$", said, re.MULTILINE)
    assert ("none has a fault" in said) if words is None else re.search(rf"\^.*{words}", said)
    assert json.loads((tmp_path / "table.json").read_text()) == [asdict(usage)]


def test_nothing_is_recorded_or_compiled_while_kernels_are_interpreted():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), launches.recorded(90, print):
        pass
    build = workloads.Build(launches.Launch("", "", {}, {}, {}, {}), "", 1)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_build(build, 90)

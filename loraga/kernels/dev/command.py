"""`python -m loraga.kernels.dev`: compile every kernel ahead of time."""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loraga.kernels.dev", description=__doc__)
    parser.add_argument("arch", type=int, nargs="*", help="compute capabilities: 80, 90, 100 (all)")
    options = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is imported, below
    return _compile(options.arch)


def _compile(archs: list[int]) -> int:
    from loraga.kernels.dev import aot
    from loraga.kernels.tuning import ARCHITECTURES

    unknown = [arch for arch in archs if arch not in ARCHITECTURES]
    if unknown:
        print(f"unknown architectures {unknown}; the table holds {list(ARCHITECTURES)}", file=sys.stderr)
        return 2
    print(f"{'kernel':<44}{'arch':>6}{'warps':>7}{'registers':>11}{'shared':>9}{'spilled':>9}")
    bad = 0
    # two at a time: ptxas, a process of its own, is most of the work
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for arch in archs or ARCHITECTURES:
            count = sum(1 for _ in aot.builds(arch))
            for usage in pool.map(partial(aot.compile_number, arch), range(count)):
                mark = "" if usage.fits else "   <-- does not fit"
                print(
                    f"{usage.label:<44}{usage.arch:>6}{usage.num_warps:>7}{usage.registers:>11}{usage.shared:>9}"
                    f"{usage.spilled:>9}{mark}",
                    flush=True,
                )
                bad += not usage.fits
    print(f"{bad} kernels spill or take more shared memory than there is" if bad else "no kernel spills, all fit")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Builds `loraga._C` with CMake; everything else is in pyproject.toml.

Environment variables:
    LORAGA_NATIVE=0: no native core at all; loraga is then pure Python and runs on torch operations.
    LORAGA_CUDA: 0 builds host only, 1 insists on CUDA; unset uses CUDA where an nvcc is found and works.
    LORAGA_CUDA_ARCHITECTURES: such as "80;90"; native code for each and PTX for the last.
    CMAKE_ARGS: further arguments to CMake.
    CMAKE_BUILD_PARALLEL_LEVEL: compile jobs (2).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CUDA_MODES = {"": "AUTO", "0": "OFF", "1": "ON"}


def read_switch(name: str, allowed: dict[str, str]) -> str:
    value = os.environ.get(name, "")
    if value not in allowed:
        raise SystemExit(f"{name}={value!r} is not known; it may be unset, 0 or 1.")
    return allowed[value]


class CMakeBuild(build_ext):
    """Runs CMake in place of setuptools' own compiler calls."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # Always anew: a CMake cache would keep the compilers and switches of an earlier build.
        build = Path(self.build_temp).resolve() / "cmake"
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DLORAGA_VERSION={self.distribution.get_version()}",
            f"-DLORAGA_CUDA={read_switch('LORAGA_CUDA', CUDA_MODES)}",
            f"-DLORAGA_CUDA_ARCHITECTURES={os.environ.get('LORAGA_CUDA_ARCHITECTURES', '')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2")
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"loraga: building the native core failed: {error}\n"
                "The output above says why. It needs CMake 3.18 and a C++17 compiler. To install loraga without "
                "its native core (it then runs on torch operations alone), set LORAGA_NATIVE=0."
            ) from error


native = read_switch("LORAGA_NATIVE", {"": "1", "0": "0", "1": "1"}) == "1"
setup(
    ext_modules=[Extension("loraga._C", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)

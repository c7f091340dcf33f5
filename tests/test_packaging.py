"""What an installed loraga looks like from outside: version, native module, and what happens without it."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import loraga
from loraga import _native
from loraga._version import __version__

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".hpp", ".cu", ".cuh"})

needs_native = pytest.mark.skipif(not _native.available(), reason=f"no native core: {_native.why_unavailable()}")


@pytest.fixture
def fresh_loader():
    """The loader asks anew, now and after the test."""
    _native._load.cache_clear()
    _native._cuda_problem.cache_clear()
    yield
    _native._load.cache_clear()
    _native._cuda_problem.cache_clear()


def test_one_version_everywhere():
    assert importlib.metadata.version("loraga") == __version__ == loraga.__version__


def test_typed_and_with_its_command():
    assert (Path(_native.__file__).parent / "py.typed").exists()
    (entry,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "loraga"]
    assert entry.value == "loraga.cli:main"


def test_torch_is_needed_to_run_but_not_to_build():
    text = (ROOT / "pyproject.toml").read_text()
    assert "torch" not in re.search(r"(?m)^requires = \[(.*)\]", text)[1]
    assert any(r.startswith("torch>=") for r in importlib.metadata.requires("loraga"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_core_knows_nothing_of_torch_and_only_the_bindings_know_python(path):
    included = re.findall(r"#include\s*[<\"]([^>\"]+)", path.read_text())
    assert included or path.name == "portable.hpp"
    assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/"))]
    if path.name != "bindings.cpp":
        assert not [name for name in included if name.startswith("pybind11/") or name == "Python.h"]


def test_no_fast_math():
    uncommented = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    assert not re.search(r"fast[-_]math|-Ofast|associative-math", uncommented)


@needs_native
def test_build_info_says_what_was_built():
    info = _native.build_info()
    assert info["version"] == __version__
    assert re.match(r"(GNU|Clang|AppleClang) \d+", info["cxx_compiler"])
    assert bool(info["cuda"]) == bool(info["cuda_compiler"]) == bool(info["cuda_architectures"])
    if info["cuda"]:
        *native, newest = info["cuda_architectures"].split()
        assert all(name.endswith("-real") for name in native)
        assert newest.isdigit()  # native code and PTX


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("nm") is None, reason="reads ELF with nm")
def test_only_the_module_entry_is_exported_and_no_cuda_library_is_needed():
    module = _native._core().__file__
    symbols = subprocess.run(["nm", "-D", "--defined-only", module], capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["PyInit__C"]
    needed = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"NEEDED.*\[(lib(?:cu|torch|c10)\S*)\]", needed)


def test_without_the_module_import_works_and_the_first_use_says_why(monkeypatch, fresh_loader):
    monkeypatch.setitem(sys.modules, "loraga._C", None)
    assert not _native.available()
    assert re.search(r"could not be loaded: .*_C.*pip install", _native.why_unavailable())
    for use in (_native.build_info, lambda: _native.jacobi_svd(torch.ones(1, 2, 2))):
        with pytest.raises(RuntimeError, match="could not be loaded"):
            use()


def test_a_module_of_another_version_is_refused(monkeypatch, fresh_loader):
    stale = SimpleNamespace(build_info=lambda: {"version": "0.0.1"})
    monkeypatch.setattr(_native, "import_module", lambda name: stale)
    assert re.search(rf"built for version 0\.0\.1, but this is {re.escape(__version__)}", _native.why_unavailable())


@needs_native
def test_unusable_devices_are_explained(monkeypatch, fresh_loader):
    assert _native.why_unavailable("meta") == "loraga's native core runs on cpu and cuda devices, not on meta."
    if not torch.cuda.is_available():
        assert _native.why_unavailable("cuda") == "torch sees no CUDA device."
        if _native.build_info()["cuda"]:  # the module asks the driver itself, and says which call failed
            assert re.search(r"cannot use cuda:0: cuda\w+\(.*\) failed: cuda", _native._cuda_problem(0))


@needs_native
def test_a_host_only_build_says_so_for_cuda(monkeypatch, fresh_loader):
    host_only = SimpleNamespace(build_info=lambda: {"version": __version__, "cuda": False})
    monkeypatch.setattr(_native, "import_module", lambda name: host_only)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "built without CUDA" in _native.why_unavailable("cuda:0")

"""What an installed loraga looks like from outside: version, native module, and what happens without it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import loraga
from loraga._version import __version__
from loraga.ops import native_core

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".hpp", ".cu", ".cuh"})

needs_native = pytest.mark.skipif(
    not native_core.available(), reason=f"no native core: {native_core.why_unavailable()}"
)


@pytest.fixture
def fresh_loader():
    """The loader asks anew, now and after the test."""
    native_core._load.cache_clear()
    native_core._device_problem.cache_clear()
    yield
    native_core._load.cache_clear()
    native_core._device_problem.cache_clear()


def test_one_version_everywhere():
    assert importlib.metadata.version("loraga") == __version__ == loraga.__version__


def test_typed_and_with_its_command():
    assert (Path(loraga.__file__).parent / "py.typed").exists()
    (entry,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "loraga"]
    assert entry.value == "loraga.cli.main:main"


def test_torch_is_needed_to_run_but_not_to_build():
    text = (ROOT / "pyproject.toml").read_text()
    assert "torch" not in re.search(r"(?m)^requires = \[(.*)\]", text)[1]
    assert any(r.startswith("torch>=") for r in importlib.metadata.requires("loraga"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_core_knows_nothing_of_torch_and_only_the_bindings_know_python(path):
    included = re.findall(r"#include\s*[<\"]([^>\"]+)", path.read_text())
    assert included or path.name in ("portable.hpp", "widths.hpp")
    assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/"))]
    if path.name != "bindings.cpp":
        assert not [name for name in included if name.startswith("pybind11/") or name == "Python.h"]


def test_no_fast_math():
    uncommented = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    assert not re.search(r"fast[-_]math|-Ofast|associative-math", uncommented)


@needs_native
def test_build_info_says_what_was_built():
    info = native_core.build_info()
    assert info["version"] == __version__
    assert re.match(r"(GNU|Clang|AppleClang) \d+", info["cxx_compiler"])
    assert info["functions"] == "cholesky_inverse fill_uniform gradient_add jacobi_svd"
    assert bool(info["cuda"]) == bool(info["cuda_compiler"]) == bool(info["cuda_architectures"])
    if info["cuda"]:
        *native, newest = info["cuda_architectures"].split()
        assert all(name.endswith("-real") for name in native)
        assert newest.isdigit()  # native code and PTX


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("nm") is None, reason="reads ELF with nm")
def test_only_the_module_entry_is_exported_and_no_cuda_library_is_needed():
    module = native_core._core().__file__
    symbols = subprocess.run(["nm", "-D", "--defined-only", module], capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["PyInit__C"]
    needed = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"NEEDED.*\[(lib(?:cu|torch|c10)\S*)\]", needed)


def test_without_the_module_import_works_and_the_first_use_says_why(monkeypatch, fresh_loader):
    monkeypatch.setitem(sys.modules, "loraga._C", None)
    assert not native_core.available()
    assert re.search(r"could not be loaded: .*_C.*pip install", native_core.why_unavailable())
    for use in (native_core.build_info, lambda: native_core.jacobi_svd(torch.ones(1, 2, 2))):
        with pytest.raises(RuntimeError, match="could not be loaded"):
            use()


def test_a_module_of_another_version_is_refused(monkeypatch, fresh_loader):
    stale = SimpleNamespace(build_info=lambda: {"version": "0.0.1"})
    monkeypatch.setattr(native_core, "import_module", lambda name: stale)
    assert re.search(rf"built for version 0\.0\.1, but this is {re.escape(__version__)}", native_core.why_unavailable())


@needs_native
def test_unusable_devices_are_explained(monkeypatch, fresh_loader):
    assert native_core.why_unavailable("meta") == "loraga's native core runs on cpu and cuda devices, not on meta."
    if not torch.cuda.is_available():
        assert native_core.why_unavailable("cuda") == "torch sees no CUDA device."
        if native_core.build_info()["cuda"]:  # the module asks the driver itself, and says which call failed
            assert re.search(r"cannot use cuda:0: cuda\w+\(.*\) failed: cuda", native_core._device_problem(0))


@needs_native
def test_a_host_only_build_says_so_for_cuda(monkeypatch, fresh_loader):
    host_only = SimpleNamespace(build_info=lambda: {"version": __version__, "cuda": False})
    monkeypatch.setattr(native_core, "import_module", lambda name: host_only)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "built without CUDA" in native_core.why_unavailable("cuda:0")


def _can_build() -> str | None:
    if not (ROOT / "csrc").is_dir():
        return "this is an installed loraga without its sources"
    missing = [name for name in ("pybind11", "setuptools", "wheel") if importlib.util.find_spec(name) is None]
    missing += [name for name in ("cmake", "c++") if shutil.which(name, path=_build_path()) is None]
    return f"a wheel cannot be built here without {', '.join(missing)}" if missing else None


def _build_path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


@pytest.mark.skipif(_can_build() is not None, reason=str(_can_build()))
def test_the_wheel_works_where_there_is_no_compiler_and_no_source(tmp_path):
    """Built without CUDA, for speed; the core's own tests then run against what was installed from it."""
    source, site, tests = tmp_path / "source", tmp_path / "site", tmp_path / "tests"
    source.mkdir()
    for name in (
        "loraga",
        "csrc",
        "setup.py",
        "CMakeLists.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "MANIFEST.in",
    ):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source)]
    environment = {**os.environ, "PATH": _build_path(), "LORAGA_CUDA": "0", "LORAGA_NATIVE": "1"}
    built = subprocess.run(build, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("loraga-*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    assert subprocess.run(install, capture_output=True).returncode == 0
    shutil.rmtree(source)

    tests.mkdir()
    for name in ("test_jacobi.py", "test_cholesky.py", "test_gradient.py", "test_backend.py"):
        shutil.copy(ROOT / "tests" / "native" / name, tests)
    (tests / "test_where.py").write_text(
        "import loraga\nfrom loraga.ops import native_core\n"
        f"def test_where():\n    assert loraga.__file__.startswith({str(site)!r})\n"
        "    assert not native_core.build_info()['cuda'] and 'csrc' not in native_core._core().__file__\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-c", os.devnull, "-p", "no:cacheprovider", str(tests)]
    few = "test_where or batches or wrong_arguments or any_strides or status or zero_singular or native_answers"
    bare = {**os.environ, "PATH": "", "PYTHONPATH": str(site)}
    ran = subprocess.run([*command, "-k", few], capture_output=True, text=True, env=bare, cwd=tests)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for name in ("test_where", "test_jacobi", "test_cholesky", "test_gradient", "test_backend"):
        assert re.search(rf"{name}\.py::\S+ PASSED", ran.stdout), ran.stdout

"""Errors with which Triton says that a kernel cannot run here. It raises them before the kernel has started."""

from __future__ import annotations

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

BEFORE_THE_START = (CompilationError, OutOfResources, PTXASError)

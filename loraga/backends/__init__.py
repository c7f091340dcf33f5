"""Implementations of the ops of `loraga._ops`; importing a module here registers it, nothing else."""

from loraga.backends import default, native, triton

__all__ = ["default", "native", "triton"]

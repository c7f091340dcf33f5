"""Implementations of the ops of `loraga._ops`; importing a module here registers it, nothing else."""

from loraga.backends import default, native

__all__ = ["default", "native"]

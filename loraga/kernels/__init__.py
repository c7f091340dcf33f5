"""Triton kernels, one family per file: kernel, launcher, reference, and the builds that are compiled ahead of time.

Nothing here is imported before a CUDA tensor or a test asks for it: see loraga/backends/triton.py.
"""

from loraga.kernels import accumulate, commit, orthonormalize, random, thin

FAMILIES = (accumulate, thin, random, commit, orthonormalize)

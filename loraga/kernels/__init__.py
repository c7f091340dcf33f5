"""Triton kernels, one family per file: kernel, launcher, reference, and the builds that are compiled ahead of time.

None of them is imported before one is used (loraga/ops/triton.py) or a test asks for it.
"""

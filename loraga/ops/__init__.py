"""The ops: declared once, run by the reference, the native core or a Triton kernel. Importing this registers them."""

from loraga.ops import native, reference, triton

__all__ = ["native", "reference", "triton"]

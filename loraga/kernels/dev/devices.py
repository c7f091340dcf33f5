"""What one streaming multiprocessor of each compute capability has, from NVIDIA's programming guide and data sheets."""

from __future__ import annotations

from dataclasses import dataclass

_KILO = 1024
# One warp gets registers in units of this many, from one of the four partitions of a multiprocessor. Every block takes
# 1 KB of shared memory besides what it asks for.
_REGISTER_UNIT = 256
_PARTITIONS = 4
_RESERVED = _KILO


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one compute capability.

    Attributes:
        processors (`int`): multiprocessors of a usual card; launchers cut sums into parts to keep so many busy.
        warps, blocks, shared (`int`): the most that are resident on one multiprocessor; `shared` in bytes.
        block_shared (`int`): bytes of shared memory that one block may take.
        tensor_columns (`int`): columns of tensor memory; 0 where there is none.
    """

    processors: int
    warps: int
    blocks: int
    shared: int
    block_shared: int
    tensor_columns: int = 0
    registers: int = 65536

    def resident(self, num_warps: int, registers: int, shared: int, tensor_columns: int = 0) -> int:
        """Blocks that fit on it at once, for `registers` per thread and bytes `shared` per block; 0: it cannot run."""
        if shared > self.block_shared:
            return 0
        per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        warps = min(self.warps, self.registers // _PARTITIONS // per_warp * _PARTITIONS)
        fits = [self.blocks, warps // num_warps, self.shared // (shared + _RESERVED)]
        if tensor_columns:
            fits.append(self.tensor_columns // tensor_columns)
        return min(fits)


MULTIPROCESSORS = {
    80: Multiprocessor(108, 64, 32, 164 * _KILO, 163 * _KILO),  # A100
    86: Multiprocessor(84, 48, 16, 100 * _KILO, 99 * _KILO),  # A40
    89: Multiprocessor(128, 48, 24, 100 * _KILO, 99 * _KILO),  # RTX 4090
    90: Multiprocessor(132, 64, 32, 228 * _KILO, 227 * _KILO),  # H100
    100: Multiprocessor(148, 64, 32, 228 * _KILO, 227 * _KILO, tensor_columns=512),  # B200
    120: Multiprocessor(170, 48, 24, 100 * _KILO, 99 * _KILO),  # RTX 5090
}
ARCHITECTURES = tuple(MULTIPROCESSORS)

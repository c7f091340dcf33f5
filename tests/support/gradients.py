"""Random gradients of given shapes, and their exact factors."""

from __future__ import annotations

import torch

from loraga.factors import Factors

SHAPES = [(48, 20), (19, 53)]


def gradient(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def exact(G, rank=None):
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return Factors(U, S, Vh).to(torch.float32).truncated(rank or S.shape[0])

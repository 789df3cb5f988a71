"""Embeddings' norms, clipped sums and cross-terms: the compiled ops, Triton's kernels, else the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpfast import reference
from dpfast.ops.backends import is_native, is_triton
from dpfast.reference.rounding import compute_dtype, drift, of_slip, unit_roundoff, with_safety


def embedding_squared_norm(ids: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms ``[B]`` of ``g_i[v] = Σ_{t: id_t = v} G_t`` and bounds, from segments of equal ids."""
    if is_native("embedding_squared_norm", G.device):
        return torch.ops.dpfast.embedding_squared_norm(ids.long().contiguous(), G.contiguous())
    if is_triton("embedding_squared_norm", G):
        from dpfast_kernels import embedding

        T, d = G.shape[1:]
        squared, absolute = embedding.embedding_squared_norm(ids.long(), G)
        bound = 2 * drift(d) * unit_roundoff(G.dtype) * absolute.double()
        # What is summed later is a sum of up to T rows of a segment, rounded at every addition.
        reach = T * unit_roundoff(G.dtype) * absolute.double().clamp_min(0).sqrt()
        return with_safety(squared, bound + of_slip(squared.double(), reach), G.dtype, squares=T * T * d)
    return reference.embedding_squared_norm(ids, G)


def embedding_sum(ids: Tensor, G: Tensor, factors: Tensor, rows: int) -> Tensor:
    """``Σ_i factor_i · g_i`` of an embedding: ``[rows, d]``, float32 (float64 for float64)."""
    dtype = compute_dtype(G.dtype)
    factors = factors.to(dtype).contiguous()
    if is_native("embedding_sum", G.device):
        return torch.ops.dpfast.embedding_sum(ids.long().contiguous(), G.contiguous(), factors, rows)
    if is_triton("embedding_sum", G):
        from dpfast_kernels.embedding_sum import embedding_sum as kernel

        return kernel(ids.long(), G, factors, rows)
    factors, ids, G = reference.left_in(factors, ids, G)
    scaled = G.to(dtype) * factors.view(-1, 1, 1)
    table = torch.zeros(rows, G.shape[-1], dtype=dtype, device=G.device)
    return table.index_add_(0, ids.reshape(-1), scaled.flatten(0, 1))


def embedding_cross_term(ids: Tensor, E: Tensor, A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """``⟨embedding part, G_iᵀ A_i⟩`` for a head tied to the embedding, and the bound on its error, ``[B]`` each.

    ``ids [B, T]``, ``E [B, T, d]`` the embedding's backprops; ``A [B, 1, S, d]``, ``G [B, 1, S, V]`` the head's.
    """
    if not is_triton("embedding_cross_term", E, A, G):
        return reference.embedding_cross_term(ids, E, A, G)
    from dpfast_kernels.embedding_cross_term import embedding_cross_term as kernel

    term, reach = kernel(ids.long(), E, A.squeeze(1), G.squeeze(1))
    units = drift(A.shape[-1]) + math.sqrt(A.shape[2] * ids.shape[1])
    return term.double(), units * unit_roundoff(G.dtype) * reach.double()

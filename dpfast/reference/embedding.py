"""Embedding rows: ``g_i[v] = Σ_{t: id_t = v} G_t``, never one-hot, never ``V × d`` unless asked for."""

import torch
from torch import Tensor

from dpfast.reference.precision import in_full_precision
from dpfast.reference.reductions import row_squares
from dpfast.reference.rounding import compute_dtype, drift, unit_roundoff, with_safety


def embedding_squared_norm(ids: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms from segments of equal ids; ``ids [B, T]``, ``G [B, T, d]``."""
    dtype = compute_dtype(G.dtype)
    B, T = ids.shape
    zeros = torch.zeros(B, dtype=torch.float64, device=G.device)
    if ids.numel() == 0:
        return zeros, zeros.clone()
    rows = G.to(dtype).reshape(B * T, -1)
    sample = torch.arange(B, device=ids.device).repeat_interleave(T)
    keys, segment = torch.unique(sample * (int(ids.max()) + 1) + ids.reshape(-1), return_inverse=True)
    sums = torch.zeros(len(keys), rows.shape[1], dtype=dtype, device=G.device).index_add_(0, segment, rows)
    owner = torch.empty(len(keys), dtype=torch.long, device=G.device)
    owner[segment] = sample
    # A segment of m rows is summed with at most m - 1 roundings of at most the sum of the rows' norms.
    sizes = torch.bincount(segment, minlength=len(keys)).double()
    reach = torch.zeros(len(keys), dtype=torch.float64, device=G.device)
    reach.index_add_(0, segment, torch.linalg.vector_norm(rows, dim=1).double())
    slip = unit_roundoff(dtype) * (sizes - 1) * reach
    squares = row_squares(sums)
    squared = zeros.index_add(0, owner, squares)
    slack = zeros.index_add(0, owner, slip * (2 * squares.sqrt() + slip))
    return with_safety(squared, slack, dtype, squares=T * rows.shape[1])


def embedding_grad_samples(ids: Tensor, G: Tensor, rows: int) -> Tensor:
    """Per-sample gradients ``[B, rows, d]``, written out."""
    dtype = compute_dtype(G.dtype)
    out = torch.zeros(ids.shape[0], rows, G.shape[-1], dtype=dtype, device=G.device)
    return out.scatter_add_(1, ids.unsqueeze(-1).expand(G.shape), G.to(dtype))


@in_full_precision
def embedding_cross_term(ids: Tensor, E: Tensor, A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """``⟨embedding part, G_iᵀ A_i⟩ = Σ_{t,s} (a_s·e_t) G[s, id_t]`` for a head tied to the embedding.

    ``ids [B, T]``, ``E [B, T, d]`` the embedding's backprops; ``A [B, 1, S, d]``, ``G [B, 1, S, V]`` the head's.
    """
    dtype = compute_dtype(G.dtype)
    A, G = A.squeeze(1).to(dtype), G.squeeze(1).to(dtype)
    E = E.to(dtype)
    gathered = torch.gather(G, 2, ids.unsqueeze(1).expand(-1, G.shape[1], -1))
    terms = torch.bmm(A, E.transpose(1, 2)).mul_(gathered).flatten(1)
    # Not from |a_s·e_t|, which may have cancelled.
    lengths_a, lengths_e = (torch.linalg.vector_norm(side, dim=2).double() for side in (A, E))
    reach = (torch.bmm(gathered.abs_().double(), lengths_e.unsqueeze(2)).squeeze(2) * lengths_a).sum(1)
    return terms.sum(1).double(), drift(A.shape[-1]) * unit_roundoff(dtype) * reach


def embedding_times_grad_samples(ids: Tensor, E: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """``⟨embedding part, h_i⟩ = Σ_t e_t · h_i[id_t]`` for per-sample gradients ``h [B, V, d]``."""
    dtype = compute_dtype(E.dtype)
    rows = torch.gather(other.to(dtype), 1, ids.unsqueeze(-1).expand(E.shape))
    terms = (rows * E.to(dtype)).sum(-1)
    length, other_length = (torch.linalg.vector_norm(side.double(), dim=2) for side in (rows, E))
    return terms.sum(1).double(), drift(E.shape[-1]) * unit_roundoff(dtype) * (length * other_length).sum(1)

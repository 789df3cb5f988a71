"""The cross-term of a head tied to the embedding: the inner product of both parts of ``g_i``, no ``V × d`` formed."""

from dataclasses import asdict

import torch
import triton
import triton.language as tl

from .common import TRITON_DTYPE, Compile, cdiv, dot, dot_dtype, launch, meta, vectorised, wide
from .embedding import Tiles, configure_tiles, totals


@triton.jit
def cross_kernel(
    ids,  # [B, T]
    E,  # [B, T, d]
    A,  # [B, S, d]
    G,  # [B, S, V]
    a_lengths,  # [B, S]
    e_lengths,  # [B, T]
    partials,  # [2, B, tiles_s, tiles_t]
    B,
    T,
    S,
    d,
    tiles_t,
    tiles_s,
    i_n,
    i_t,
    e_n,
    e_t,
    e_d,
    a_n,
    a_s,
    a_d,
    g_n,
    g_s,
    g_v,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Σ_{s,t} (a_s · e_t) G[s, id_t] over one tile, and Σ ‖a_s‖ ‖e_t‖ |G[s, id_t]|, which bounds its rounding
    index = tl.program_id(0)
    n = (index // (tiles_t * tiles_s)).to(tl.int64)
    s = (index // tiles_t % tiles_s * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    t = (index % tiles_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    id = tl.load(ids + n * i_n + t * i_t, mask=t < T, other=0)
    a_tile = A + n * a_n + s[:, None] * a_s + k[None, :] * a_d
    e_tile = E + n * e_n + t[None, :] * e_t + k[:, None] * e_d
    products = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        # [BLOCK_T, BLOCK_K] and [BLOCK_K, BLOCK_T]
        a = tl.load(a_tile, mask=(s < S)[:, None] & (k < d - start)[None, :], other=0.0).to(DTYPE)
        e = tl.load(e_tile, mask=(t < T)[None, :] & (k < d - start)[:, None], other=0.0).to(DTYPE)
        products = dot(a, e, products, PRECISION)
        a_tile += BLOCK_K * wide(a_d)
        e_tile += BLOCK_K * wide(e_d)
    # [BLOCK_T, BLOCK_T]
    both = (s < S)[:, None] & (t < T)[None, :]
    gathered = tl.load(G + n * g_n + s[:, None] * g_s + id[None, :] * g_v, mask=both, other=0.0).to(tl.float32)
    terms = tl.where(both, products * gathered, 0.0)
    a_length = tl.load(a_lengths + n * S + s, mask=s < S, other=0.0)
    lengths = a_length[:, None] * tl.load(e_lengths + n * T + t, mask=t < T, other=0.0)[None, :]
    reach = tl.where(both, lengths * tl.abs(gathered), 0.0)
    tl.store(partials + index, tl.sum(terms))
    tl.store(partials + wide(B) * tiles_t * tiles_s + index, tl.sum(reach))


@torch.library.custom_op("dpfast_kernels::embedding_cross_term", mutates_args=())
def embedding_cross_term(
    ids: torch.Tensor, E: torch.Tensor, A: torch.Tensor, G: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``⟨embedding's part, head's part⟩`` of ``g_i`` where a head is tied to the embedding, no ``V × d`` formed.

    Args:
        ids, E: the embedding's ids ``[B, T]`` and backprops ``[B, T, d]``.
        A, G: the head's activations ``[B, S, d]`` and backprops ``[B, S, V]``.

    Returns:
        ``Σ_{s,t} (a_s·e_t) G[s, id_t]`` and, for a bound on its error, ``Σ_{s,t} ‖a_s‖ ‖e_t‖ |G[s, id_t]|``: ``[B]``
        float32 each.
    """
    return cross_term_with(ids, E, A, G)


def cross_term_with(
    ids: torch.Tensor, E: torch.Tensor, A: torch.Tensor, G: torch.Tensor, tiles: Tiles | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    (B, T, d), S = E.shape, A.shape[1]
    dtype = dot_dtype(A, E)
    tiles = tiles or configure_tiles(max(T, S), dtype, vectorised(A, E))
    tiles_t, tiles_s = cdiv(T, tiles.BLOCK_T), cdiv(S, tiles.BLOCK_T)
    partials = torch.empty((2, B, tiles_s, tiles_t), dtype=torch.float32, device=G.device)
    strides = (stride for side in (ids, E, A, G) for stride in side.stride())
    # before, once for each position: in the loop over d each tile would make them anew, in the way of its products
    lengths = (torch.linalg.vector_norm(X, dim=2, dtype=torch.float32).contiguous() for X in (A, E))
    arguments = (ids, E, A, G, *lengths, partials, B, T, S, d, tiles_t, tiles_s, *strides)
    options = {"DTYPE": TRITON_DTYPE[dtype], "PRECISION": "ieee", **asdict(tiles)}
    launch(cross_kernel, (B * tiles_s * tiles_t,), *arguments, device=G.device, **options)
    return totals(partials)


@embedding_cross_term.register_fake
def _(ids, E, A, G):
    return tuple(G.new_empty(G.shape[0], dtype=torch.float32) for _ in range(2))


def _case(dtype: torch.dtype, B: int, T: int, d: int, wgmma: bool) -> Compile:
    ids, E, G = meta(B, T, dtype=torch.int64), meta(B, T, d, dtype=dtype), meta(B, T, 50257, dtype=dtype)
    return Compile(f"embedding_cross_term {dtype} {B}x{T}x{d}", lambda: cross_term_with(ids, E, E, G), wgmma)


COMPILES = [
    _case(torch.bfloat16, 32, 1024, 1024, True),
    _case(torch.float32, 32, 1024, 1024, False),
    _case(torch.bfloat16, 2, 1000, 1023, False),
]

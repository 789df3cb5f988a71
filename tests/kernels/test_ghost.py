"""Ghost norms against sums over pairs of positions in float64."""

import pytest
import torch
import triton
import triton.language as tl
from dpfast_kernels import ghost, ghost_tiles
from dpfast_kernels.common import Chip

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(A: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """[4, N] in float64, one sample at a time."""
    out = []
    for a, g in zip(A.double(), G.double(), strict=True):
        gradient, absolute = g.T @ a, ((a @ a.T) * (g @ g.T)).abs()
        out.append(torch.stack([gradient.square().sum(), absolute.sum(), a.square().sum(), g.square().sum()]))
    return torch.stack(out, 1) if out else torch.zeros(4, 0, dtype=torch.float64, device=A.device)


def bound(A: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """What float32 sums of the exact products can differ by: a rounding a term, of terms as large as can be."""
    T, d = A.shape[1:]
    energy_A, energy_G = A.double().square().sum((1, 2)), G.double().square().sum((1, 2))
    product = energy_A * energy_G
    return (d + G.shape[2] + T + 16) * 2**-24 * torch.stack([product, product, energy_A, energy_G])


def check(A: torch.Tensor, G: torch.Tensor, stats: torch.Tensor) -> None:
    assert stats.dtype == torch.float32
    error = (stats.double() - reference(A, G)).abs()
    assert (error <= bound(A, G)).all(), (error / bound(A, G)).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "T", "d", "p"), [(3, 37, 21, 18), (2, 64, 16, 50), (5, 1, 7, 3), (1, 16, 33, 1)])
def test_values(device, dtype, N, T, d, p):
    A, G = torch.randn(N, T, d, device=device).to(dtype), torch.randn(N, T, p, device=device).to(dtype)
    check(A, G, ghost.ghost_norm(A, G))


WIDE = ghost.Config(16, 32, 16, 4, 1)
"""As the tiles of 128 × 256, and the smallest of that form."""


@pytest.fixture
def few_programs(monkeypatch):
    """Three, each of which goes through many tiles and keeps those of A Aᵀ in one place."""
    monkeypatch.setattr(ghost, "chip", lambda device: Chip(3, 90))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(3, 37, 21, 18), (1, 32, 16, 9), (2, 65, 5, 1), (2, 3, 4, 3)], ids=str)
def test_wide_tiles(device, few_programs, dtype, sizes):
    """Odd and even numbers of blocks of positions, one alone, and more of them than there are programs, or fewer."""
    N, T, d, p = sizes
    A, G = torch.randn(N, T, d, device=device).to(dtype), torch.randn(N, T, p, device=device).to(dtype)
    check(A, G, ghost.run([A], [G], WIDE)[0])


def test_wide_tiles_of_many_layers(device, few_programs):
    """Each layer meets the tile of its own input, strides and all, and what is not finite stays in its sample."""
    X, Y = torch.randn(2, 33, 7, device=device), torch.randn(33, 2, 14, device=device)[:, :, ::2].transpose(0, 1)
    As = [X, Y.contiguous(), X, Y, Y]
    Gs = [torch.randn(2, 33, 6, device=device) for _ in As]
    before = ghost.run(As, Gs, WIDE)
    for A, G, found in zip(As, Gs, before, strict=True):
        check(A, G, found)
    for G in Gs:
        G[1, 32, 5] = float("nan")
    after = ghost.run(As, Gs, WIDE)
    assert torch.equal(after[:, :, 0], before[:, :, 0]) and after[:, [0, 1, 3], 1].isnan().all()


@pytest.mark.parametrize("config", [None, WIDE], ids=["square", "wide"])
def test_each_pair_once(device, few_programs, config):
    """Of whole numbers every sum is exact: a pair that is missing, or there twice, shows."""
    for T in (1, 16, 33, 49):
        A, G = (torch.randint(-2, 3, (1, T, n), device=device).float() for n in (3, 2))
        assert torch.equal(ghost.run([A], [G], config)[0].double(), reference(A, G))


@pytest.mark.parametrize(
    "layers, N, T, d, p, wide",
    [
        (1, 8, 512, 1024, 4096, False),
        (1, 64, 4096, 4096, 4096, True),
        (3, 16, 1024, 1024, 1024, False),
        (1, 8, 4096, 64, 64, False),
    ],
)
def test_wide_where_fewer_bytes_move(monkeypatch, layers, N, T, d, p, wide):
    """The form whose busiest processor moves less through the L2 cache, where both are to be had."""
    monkeypatch.setattr(ghost, "INTERPRETED", False)
    sizes = N, T, d, p, layers
    large, before = Chip(132, 90), Chip(108, 80)
    chosen = ghost.configure(*sizes, torch.bfloat16, True, large)
    assert chosen == (ghost.WIDE if wide else ghost.SQUARE)
    least = min(ghost.cache_bytes(config, *sizes, large) for config in (ghost.SQUARE, ghost.WIDE))
    assert ghost.cache_bytes(chosen, *sizes, large) == least
    assert ghost.configure(*sizes, torch.bfloat16, True, before).BLOCK_S == 128
    for slow in ((torch.float32, True), (torch.float16, False)):
        config = ghost.configure(*sizes, *slow, large)
        assert config.BLOCK_T == config.BLOCK_S == 64


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_many_layers(device, dtype, monkeypatch):
    """Inputs of three, two and one layers, of two sizes, in several launches; results in the order of the layers."""
    sides = [torch.randn(2, 20, 9, device=device).to(dtype) for _ in range(4)]
    As = [sides[k] for k in (0, 1, 0, 2, 3, 0, 1, 3)] + [torch.randn(2, 20, 5, device=device).to(dtype)]
    Gs = [torch.randn(2, 20, 6 + 3 * (k == 4), device=device).to(dtype) for k in range(len(As))]
    launched = []
    made = ghost.launch
    monkeypatch.setattr(
        ghost, "launch", lambda kernel, grid, *args, **kw: launched.append(grid) or made(kernel, grid, *args, **kw)
    )
    stats = ghost.ghost_norms(As, Gs)
    assert stats.shape == (len(As), 4, 2)
    made_of = [grid[0] for grid in launched]
    for A, G, found in zip(As, Gs, stats, strict=True):
        check(A, G, found)
        assert torch.equal(found, ghost.ghost_norm(A, G))
    # input 0 of three layers; 1 and 3, which have two, one of input 3 being of another size; 2; and the one of size 5
    assert sum(made_of) == 6 * launched[-1][0] and len(made_of) == 5


def test_two_dtypes(device):
    A, G = torch.randn(2, 20, 9, device=device), torch.randn(2, 20, 5, device=device).bfloat16()
    check(A, G, ghost.ghost_norm(A, G))


@pytest.mark.parametrize("N, T, d, p", [(0, 5, 4, 3), (3, 0, 4, 3), (3, 5, 0, 3), (3, 5, 4, 0)])
def test_empty(device, N, T, d, p):
    A, G = torch.randn(N, T, d, device=device), torch.randn(N, T, p, device=device)
    stats = ghost.ghost_norm(A, G)
    assert stats.shape == (4, N)
    assert not stats[:2].any()
    check(A, G, stats)


def test_strides(device):
    """Transposed and sliced views, and one sample's values for all."""
    A = torch.randn(20, 3, 2 * 11, device=device)[:, :, ::2].transpose(0, 1)
    G = torch.randn(1, 6, 40, device=device).expand(3, 6, 40)[:, :, 1::2].transpose(1, 2)
    check(A, G, ghost.ghost_norm(A, G))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_far_apart(device, far_apart, dim):
    A, G = torch.randn(3, 17, 17, device=device).half(), torch.randn(3, 17, 17, device=device).half()
    check(A, G, ghost.ghost_norm(far_apart(A, dim), far_apart(G, dim)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_sample_alone(device, value):
    """What is not finite in one sample changes no bit of another's."""
    A, G = torch.randn(3, 20, 9, device=device), torch.randn(3, 20, 5, device=device)
    before = ghost.ghost_norm(A, G)
    A[1, 19, 8] = value
    G[1, 19, 4] = value
    after = ghost.ghost_norm(A, G)
    assert not after[:, 1].isfinite().any()
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])


@triton.jit
def pairs_kernel(out, tiles):
    row, column = ghost_tiles.tile_pair(tl.program_id(0), tiles)
    tl.store(out + 2 * tl.program_id(0), row)
    tl.store(out + 2 * tl.program_id(0) + 1, column)


def test_pairs(device):
    """Each pair of tiles once, for odd and even numbers of tiles."""
    for tiles in range(1, 10):
        found = torch.full((ghost_tiles.pairs_of(tiles, 1), 2), -1, dtype=torch.int32, device=device)
        pairs_kernel[(len(found),)](found, tiles)
        assert sorted(found.tolist()) == [[t, s] for t in range(tiles) for s in range(t, tiles)]


def test_op(device):
    A, G = torch.randn(2, 20, 9, device=device), torch.randn(2, 20, 5, device=device)
    torch.library.opcheck(ghost.ghost_norm, (A, G))
    torch.library.opcheck(ghost.ghost_norms, ([A, A], [G, G[:, :, :4]]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(30, 513, 1040, 272), (30, 512, 333, 50), (1, 512, 1024, 256), (30, 1000, 1024, 4096)]
)
def test_large_tiles(gpu, dtype, sizes):
    N, T, d, p = sizes
    A, G = torch.randn(N, T, d, device=gpu).to(dtype), torch.randn(N, T, p, device=gpu).to(dtype)
    check(A, G, ghost.ghost_norm(A, G))


@pytest.mark.gpu
def test_captured(gpu, replayed):
    A, G = torch.randn(3, 20, 9, device=gpu), torch.randn(3, 20, 5, device=gpu)
    check(A, G, replayed(lambda: ghost.ghost_norm(A, G)))

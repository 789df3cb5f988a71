"""What ghost norms on a CPU are made of: as in float64, for samples of any lengths at any place, and by any threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpfast import native, reference
from dpfast.ops import matmul

TINY = torch.finfo(torch.float32).tiny


def stats(A, G, samples):
    """``[n, 5, samples]`` of samples in one row."""
    first, end = ([*each] for each in zip(*samples, strict=True)) if samples else ([], [])
    A, G = ([x[None] for x in each] for each in (A, G))
    return torch.ops.dpfast.ghost_stats(A, G, [0] * len(first), first, end, TINY)


def close(got, want):
    """Sums that cancel are off by what was added up."""
    torch.testing.assert_close(got[:, 1:], want[:, 1:], rtol=1e-5, atol=1e-30)
    assert ((got[:, 0] - want[:, 0]).abs() <= 1e-5 * want[:, 1]).all()


@pytest.mark.parametrize("d, p", [(1, 1), (15, 17), (64, 1030), (2100, 3)])
@pytest.mark.parametrize("lengths", [[1], [2, 3, 5, 7], [47, 48, 49], [300, 1, 97]], ids=str)
def test_as_in_float64(ops, lengths, d, p):
    """Around the blocks of every instruction set, with NaN between the samples and behind the last."""
    samples, rows = [], 2
    for n in lengths:
        samples.append((rows, rows + n))
        rows += n + 3
    A, G, other = (torch.full((rows, n), torch.nan) for n in (d, p, p))
    for first, end in samples:
        for side in (A, G, other):
            side[first:end] = torch.randn(end - first, side.shape[1])
    got = stats([A, A], [G, other], samples)
    want = [reference.packed_ghost_stats(A.double(), side.double(), samples) for side in (G, other)]
    close(got, torch.stack(want))


def test_an_input_that_is_shared_changes_nothing(ops):
    """Its products are made once: the same bits as from a copy of it."""
    A, G = torch.randn(70, 33), [torch.randn(70, p) for p in (5, 129, 16)]
    samples = [(0, 20), (20, 70)]
    assert torch.equal(stats([A, A, A], G, samples), stats([A.clone() for _ in G], G, samples))
    wide = torch.randn(35, 66)
    both = stats([wide, wide], [torch.randn(35, 4), torch.randn(35, 4)], [(0, 35)])
    assert both.isfinite().all() and not torch.equal(both[0], both[1])


def test_a_sample_knows_nothing_of_others(ops):
    """The same bits alone, and beside samples that are NaN or infinite."""
    A, G = torch.randn(90, 40), torch.randn(90, 24)
    alone = stats([A[30:61].contiguous()], [G[30:61].contiguous()], [(0, 31)])
    for value in (torch.nan, torch.inf, 1e30):
        A[:30], G[61:] = value, value
        assert torch.equal(stats([A], [G], [(0, 30), (30, 61), (61, 90)])[:, :, 1:2], alone)


def test_a_norm_that_overflows_is_not_finite(ops):
    A, G = torch.full((3, 8), 1e20), torch.full((3, 8), 1e20)
    assert not stats([A], [G], [(0, 3)])[0, 0].isfinite().any()


def test_no_samples_and_no_positions(ops):
    A, G = torch.randn(4, 3), torch.randn(4, 2)
    assert stats([A], [G], []).shape == (1, 5, 0)
    assert not stats([A], [G], [(2, 2)]).any()


@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_bits_with_any_number_of_threads(ops, threads):
    A, G = torch.randn(400, 96), torch.randn(400, 200)
    samples = [(0, 13), (13, 250), (250, 400)]
    alone, before = stats([A], [G], samples), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(stats([A], [G], samples), alone)
    finally:
        torch.set_num_threads(before)


OTHER = """
import sys, torch
from dpfast import native
assert native.available("cpu"), native.why_not("cpu")
given = torch.load(sys.argv[1])
torch.save([native.instruction_set(), torch.ops.dpfast.ghost_stats(*given)], sys.argv[1])
"""


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_every_instruction_set(ops, isa, tmp_path):
    """Lanes are added up in another order: as close to float64."""
    A, G, samples = torch.randn(130, 77), torch.randn(130, 45), [(0, 9), (9, 130)]
    file = tmp_path / "given.pt"
    torch.save(([A[None]], [G[None]], [0, 0], [0, 9], [9, 130], TINY), file)
    env = os.environ | {"DPFAST_CPU_ISA": isa, "DPFAST_LIBRARY_CPU": str(native.library("cpu").path)}
    here = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", OTHER, str(file)], check=True, cwd=here, env=env, timeout=300)
    used, got = torch.load(file)
    if used != isa:
        pytest.skip(f"this machine has no {isa}: it used {used}")
    close(got, reference.packed_ghost_stats(A.double(), G.double(), samples)[None])


def test_sides_where_they_lie(ops):
    """Samples of several rows, with the batch second, and a part of wider rows: as of copies."""
    T, N = 50, 3
    A, G = torch.randn(T, N, 24).transpose(0, 1), torch.randn(N, T, 40)[..., 3:20]
    samples = matmul.Samples([0, 0, 2], [1, 20, 0], [20, 50, 49])
    got = ops.ghost_stats([A], [G], *samples, TINY)
    assert torch.equal(got, ops.ghost_stats([A.contiguous()], [G.contiguous()], *samples, TINY))
    one_row = [x.reshape(N * T, -1).double() for x in (A, G)]
    close(got, reference.packed_ghost_stats(*one_row, [(1, 20), (20, 50), (2 * T, 2 * T + 49)])[None])


@pytest.mark.parametrize("d, p", [(0, 5), (5, 0)])
def test_a_layer_without_features(ops, d, p):
    A, G = torch.randn(4, 1, 3, d), torch.randn(4, 1, 3, p)
    for dtype in (torch.float32, torch.bfloat16):
        squared, _ = matmul.ghost_squared_norms([(A.to(dtype), G.to(dtype))])
        assert squared.shape == (1, 4) and not squared.any()


@pytest.mark.parametrize(
    "A, G, row, first, end, why",
    [
        ([(1, 4, 3)], [(1, 4, 2), (1, 4, 2)], [0], [0], [1], "lists of one length"),
        ([(1, 4, 3)], [(1, 5, 2)], [0], [0], [1], r"G\[0\] must be \[N, T, features\]"),
        ([(4, 3)], [(1, 4, 2)], [0], [0], [1], r"A\[0\] must be \[N, T, features\]"),
        ([(1, 4, 3)], [(1, 4, 2)], [0], [0, 1], [1], "row, first and end must be lists of one length"),
        ([(1, 4, 3)], [(1, 4, 2)], [0], [0], [5], "sample 0 has the positions 0 to 5 of row 0"),
        ([(1, 4, 3)], [(1, 4, 2)], [0], [3], [2], "sample 0 has the positions 3 to 2 of row 0"),
        ([(1, 4, 3)], [(1, 4, 2)], [0], [-1], [2], "sample 0 has the positions -1 to 2 of row 0"),
        ([(1, 4, 3)], [(1, 4, 2)], [1], [0], [2], "sample 0 has the positions 0 to 2 of row 1"),
        ([(1, 4, 3)], [(1, 4, 2)], [-1], [0], [2], "sample 0 has the positions 0 to 2 of row -1"),
    ],
)
def test_what_is_refused(ops, A, G, row, first, end, why):
    sides = [[torch.zeros(shape) for shape in each] for each in (A, G)]
    with pytest.raises(RuntimeError, match=why):
        ops.ghost_stats(*sides, row, first, end, TINY)


def test_other_dtypes_and_features_apart_are_refused(ops):
    A, G = torch.zeros(1, 4, 3), torch.zeros(1, 4, 2)
    with pytest.raises(RuntimeError, match=r"A\[0\] must be float32"):
        ops.ghost_stats([A.double()], [G], [0], [0], [1], TINY)
    with pytest.raises(RuntimeError, match=r"G\[0\] must have its features one behind the other"):
        ops.ghost_stats([A], [torch.zeros(1, 2, 4).transpose(1, 2)], [0], [0], [1], TINY)


@pytest.mark.parametrize("most", [1, 1 << 9, 1 << 26])
def test_sides_in_16_bits_are_copied_in_parts(monkeypatch, most):
    """The same bits as of copies in float32, beside sides that are."""
    monkeypatch.setattr(matmul, "MOST_COPIED", most)
    samples = matmul.Samples([0, 0, 1, 1], [1, 4, 2, 10], [4, 20, 3, 20])
    A, G, other = torch.randn(2, 20, 12).bfloat16(), torch.randn(2, 20, 7).bfloat16(), torch.randn(2, 20, 3).bfloat16()
    got = matmul.native_stats([(A, G), (A.float(), G.float()), (A, other)], samples)
    want = matmul.native_stats([(A.float(), G.float()), (A.float(), other.float())], samples)
    assert torch.equal(got, want[[0, 0, 1]])
    assert matmul.native_stats([(A, G)], matmul.Samples([], [], [])).shape == (1, 5, 0)

"""Single ops at fixed sizes, and a small private step, under pytest-benchmark: ``pytest bench/ --benchmark-only``.

On the CPU, and on a GPU where there is one. What is timed here is looked up by name when its turn comes and imports
nothing of the bench, so that ``bench.compare`` can run this very file on another commit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("pytest_benchmark", reason="timing ops needs the extra 'test'")

import dpfast
from dpfast import ops

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
THREADS = int(os.environ.get("DPFAST_BENCH_THREADS", min(2, os.cpu_count() or 1)))
KEY = (1, 2, 3, 4, 5, 6, 7, 8)
Call = Callable[[], Any]
Make = Callable[[torch.device], Call]


@pytest.fixture(autouse=True)
def settled():
    """The same threads and the same random inputs for each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def narrow(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def normal(device: torch.device, *size: int) -> Tensor:
    return torch.randn(*size, device=device, dtype=narrow(device))


def op(name: str) -> Callable[..., Any]:
    """An op by its name, which another commit may not have."""
    return getattr(ops, name)


# ---------------------------------------------------------------- what is timed

B, T, D, P = 16, 128, 256, 256  # of products
ROWS = 1000  # of an embedding
ELEMENTS = 1 << 20  # of noise
IMAGE = (16, 32, 16, 16)


def of_products(name: str, with_factors: bool = False, T: int = T) -> Make:
    def make(device: torch.device) -> Call:
        A, G = normal(device, B, 1, T, D), normal(device, B, 1, T, P)
        factors = (torch.rand(B, device=device),) if with_factors else ()
        return lambda: op(name)(A, G, *factors)

    return make


def tiles(device: torch.device) -> Call:
    A, G = normal(device, B, 1, T, D), normal(device, B, 1, T, P)
    if not op("has_tiles")(A, G):
        pytest.skip("there is no norm-GEMM on this device")
    return lambda: op("tile_squared_norm")(A, G)


def weighted_sums(device: torch.device) -> Call:
    samples = [torch.randn(B, n, device=device) for n in (P * D, P, D)]
    factors = [torch.rand(B, device=device)] * len(samples)
    return lambda: op("weighted_sums")(samples, factors)


def squared_norm(device: torch.device) -> Call:
    samples = torch.randn(B, P * D, device=device)
    return lambda: op("squared_norm")(samples)


def sum_positions(device: torch.device) -> Call:
    G = normal(device, B, T, D)
    return lambda: op("sum_positions")(G)


def normalised_sums(device: torch.device) -> Call:
    G, x = normal(device, B, T, D), normal(device, B, T, D)
    mean, rstd = torch.randn(B, T, device=device), torch.rand(B, T, device=device)
    return lambda: op("normalised_sums")(G, x, mean, rstd)


def channel_sums(device: torch.device) -> Call:
    G, x = normal(device, B, T, D), normal(device, B, T, D)
    mean, rstd = (torch.rand(B, 8, device=device) for _ in range(2))
    return lambda: op("channel_sums")(G, x, mean, rstd)


def of_embedding(name: str) -> Make:
    def make(device: torch.device) -> Call:
        """Ids are as frequent as words are."""
        frequency = 1 / torch.arange(1.0, ROWS + 1)
        ids = torch.multinomial(frequency, B * T, replacement=True).view(B, T).to(device)
        G, factors = normal(device, B, T, D), torch.rand(B, device=device)
        more = (factors, ROWS) if name == "embedding_sum" else ()
        return lambda: op(name)(ids, G, *more)

    return make


def cross_term(device: torch.device) -> Call:
    ids, E = torch.randint(ROWS, (B, T), device=device), normal(device, B, T, D)
    A, G = normal(device, B, 1, T, D), normal(device, B, 1, T, ROWS)
    return lambda: op("embedding_cross_term")(ids, E, A, G)


def of_convolution(name: str) -> Make:
    def make(device: torch.device) -> Call:
        x, G = normal(device, *IMAGE), normal(device, *IMAGE)
        weight = normal(device, IMAGE[1], IMAGE[1], 3, 3)
        geometry = ops.Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
        last = torch.rand(IMAGE[0], device=device) if name == "convolution_clipped_gradient" else IMAGE[0]
        return lambda: op(name)(x, G, weight, geometry, last)

    return make


def noise(grid: float) -> Make:
    def make(device: torch.device) -> Call:
        summed = torch.randn(ELEMENTS, device=device)
        grad = torch.empty_like(summed)
        return lambda: op("noisy_grad_")([summed], [grad], [0], ops.Noise(KEY, 1, 1.0, grid, 0.5))

    return make


def update(rule: str) -> Make:
    def make(device: torch.device) -> Call:
        if not ops.is_native("noisy_adam_", device):
            pytest.skip("there is no compiled library on this device")
        summed, param, *states = (torch.rand(ELEMENTS // 4, device=device) for _ in range(4))
        adam = rule == "AdamW"
        numbers = ops.Adam(1e-3, 0.9, 0.999, 1e-8, 0.01, t=3.0, decoupled=True) if adam else ops.SGD(1e-3, momentum=0.9)
        lists = [[states[0]], [states[1]], []] if adam else [[states[0]]]
        noise = ops.Noise(KEY, 1, 1.0, 0.0, 1e-3)
        return lambda: op("noisy_step_")(numbers, [param], [summed], [summed], lists, [], [0], noise)

    return make


def clip_factors(device: torch.device) -> Call:
    squared = torch.rand(1, 4096, device=device, dtype=torch.float64)
    thresholds = torch.ones(1, device=device, dtype=torch.float64)
    return lambda: op("clip_factors")(squared, 1e-6 * squared, thresholds)


# ---------------------------------------------------------------- whole private steps


class Block(nn.Module):
    """Of a transformer, on token ids."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(ROWS, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = (
            side.unflatten(-1, (self.heads, -1)).transpose(1, 2) for side in self.qkv(self.first(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(self.second(x)))[:, -1])


def mlp(device: torch.device) -> Call:
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))
    return private_step(model.to(device), torch.randn(64, 784, device=device))


def block(device: torch.device) -> Call:
    return private_step(Block(128, 4).to(device), torch.randint(ROWS, (8, 64), device=device))


def private_step(model: nn.Module, x: Tensor) -> Call:
    y = torch.randint(10, (len(x),), device=x.device)
    engine = dpfast.PrivacyEngine()
    made, optimizer, _ = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=len(x)),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )

    def step() -> Tensor:
        loss = F.cross_entropy(made(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


CASES: dict[str, Make] = {
    "ghost_squared_norm": of_products("ghost_squared_norm"),
    "tile_squared_norm": tiles,
    "one_position_squared_norm": of_products("one_position_squared_norm", T=1),
    "grad_samples": of_products("grad_samples"),
    "clipped_weight_gradient": of_products("clipped_weight_gradient", with_factors=True),
    "weighted_sums": weighted_sums,
    "squared_norm": squared_norm,
    "sum_positions": sum_positions,
    "normalised_sums": normalised_sums,
    "channel_sums": channel_sums,
    "embedding_squared_norm": of_embedding("embedding_squared_norm"),
    "embedding_sum": of_embedding("embedding_sum"),
    "embedding_cross_term": cross_term,
    "convolution_grad_samples": of_convolution("convolution_grad_samples"),
    "convolution_squared_norm": of_convolution("convolution_squared_norm"),
    "convolution_clipped_gradient": of_convolution("convolution_clipped_gradient"),
    "noise_fast": noise(0.0),
    "noise_secure": noise(2.0**-24),
    "noisy_step_AdamW": update("AdamW"),
    "noisy_step_SGD": update("SGD"),
    "clip_factors": clip_factors,
    "private_step_mlp": mlp,
    "private_step_transformer_block": block,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_op(name: str, kind: str, benchmark: Any) -> None:
    device = torch.device(kind)
    call = CASES[name](device)

    def until_done() -> Any:
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result

    for _ in range(3):  # may build, compile, or check what is trusted afterwards
        until_done()
    benchmark.group = kind
    result = benchmark(until_done)
    tensors = [result] if isinstance(result, Tensor) else [one for one in result or () if isinstance(one, Tensor)]
    assert all(one.isfinite().all() for one in tensors)

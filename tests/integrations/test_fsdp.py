"""``fully_shard``: a step over shards is the step of one process on the union of the batches, at any world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from dpfast import PrivacyEngine
from dpfast.data.physical_batches import BatchMemoryManager
from dpfast.data.sampling import PoissonBatches
from dpfast.distributed.ranks import first_element
from dpfast.integrations.distributed import load_checkpoint, save_checkpoint

STEPS, N, PER_EPOCH, SEED, V, T = 6, 24, 8, 21, 11, 5


class Block(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Widths that three ranks do not share evenly; a head of one row, which two ranks have nothing of."""

    def __init__(self, tied: bool = False, d: int = 7):
        super().__init__()
        self.embed, self.position = nn.Embedding(V, d), nn.Embedding(T, d)
        self.blocks = nn.ModuleList([Block(d), Block(d)])
        self.gate, self.head = nn.Linear(d, 1), nn.Linear(d, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.position(torch.arange(T)[None])
        for block in self.blocks:
            x = block(x)
        return self.head(x * torch.sigmoid(self.gate(x)))


def data() -> TensorDataset:
    draw = torch.Generator().manual_seed(3)
    return TensorDataset(*torch.randint(0, V, (2, N, T), generator=draw))


def net(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Net(tied)


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "sgd": lambda: torch.optim.SGD(trained, lr=0.1, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(trained, lr=0.01),
        "own step": lambda: torch.optim.RMSprop(trained, lr=0.01),
    }[name]()


def private(rank: int, world_size: int, optimizer: str, tied: bool = False, frozen: str = "", **options: Any) -> tuple:
    model = base = net(tied).to(options.pop("dtype", torch.float32))
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or frozen not in name)
    if (adapted := options.pop("adapted", None)) is not None:
        lora = pytest.importorskip("peft").LoraConfig(r=2, target_modules=adapted, init_lora_weights=False)
        model = pytest.importorskip("peft").get_peft_model(base, lora)
    if world_size > 1:
        policy = MixedPrecisionPolicy(**options.pop("policy", {}))
        for block in base.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    engine = PrivacyEngine(accountant="rdp")
    batches = PoissonBatches(N, PER_EPOCH, seed=SEED, rank=rank, world_size=world_size)
    settings = dict(noise_multiplier=0.7, max_grad_norm=0.5, poisson_sampling=False)
    private_model, private_optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer_of(optimizer, model),
        data_loader=DataLoader(data(), batch_sampler=batches),
        noise_generator=torch.Generator().manual_seed(5 + 100 * rank),
        **(settings | options),
    )
    return engine, private_model, private_optimizer, loader


def whole(x: Any) -> torch.Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def train(model: Any, optimizer: Any, batches: Any, steps: int = STEPS) -> list:
    x, y = data().tensors
    seen = []
    for _, indices in zip(range(steps), batches, strict=False):
        loss = F.cross_entropy(model(x[indices]).flatten(0, 1), y[indices].flatten(), reduction="sum")
        loss.div(max(1, len(indices))).backward()
        optimizer.step()
        seen.append(torch.cat([whole(p.grad).flatten() for p in model.parameters() if p.requires_grad]))
        optimizer.zero_grad()
    return [*seen, torch.cat([whole(p).flatten() for p in model.parameters()])]


def train_rank(rank: int, world_size: int, kind: str, options: dict) -> list:
    engine, model, optimizer, loader = private(rank, world_size, kind, **options)
    return [*train(model, optimizer, loader.batch_sampler), engine.accountant.history]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sgd", {}),
        ("adamw", {"clipping": "per_layer", "tied": True}),
        ("own step", {"frozen": "blocks.0"}),
    ],
    ids=["sgd", "adamw, per layer, tied", "an optimizer without a fused update, frozen layers"],
)
def test_shards_together_are_one_process(kind, options, ranks):
    alone = train_rank(0, 1, kind, options)
    for found in ranks(train_rank, 3, kind, options):
        for got, want in zip(found[:-1], alone[:-1], strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
        assert found[-1] == alone[-1]


def train_adapters(rank: int, world_size: int, clipping: str) -> tuple:
    """The noise of a step without samples, per-sample norms by step and index, noisy gradients, weights, the base."""
    adapted = ["up", "down", "gate", "head"]
    _, model, optimizer, loader = private(rank, world_size, "adamw", adapted=adapted, clipping=clipping)
    noise = train(model, optimizer, [[]], steps=1)[0]
    norms: list[dict[int, float]] = []
    seen = []
    for indices in loader.batch_sampler:
        *gradients, after = train(model, optimizer, [indices], steps=1)
        seen += gradients
        norms.append(dict(zip(indices, model.per_sample_gradient_norms.tolist(), strict=True)))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    local = sum((p.to_local() if world_size > 1 else p).numel() for p in frozen)
    assert not any(p in optimizer.state for p in frozen)
    base = {name: whole(p) for name, p in model.named_parameters() if not p.requires_grad}
    return noise, norms, [*seen, after], base, local


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_adapters_on_a_sharded_base_are_one_process(clipping, ranks):
    """LoRA of PEFT: what is frozen is sharded too, and stays as it is."""
    noise, norms, seen, base, size = train_adapters(0, 1, clipping)
    assert max(len(step) for step in norms) > 3 and max(max(step.values(), default=0) for step in norms) > 0.5
    together = ranks(train_adapters, 3, clipping)
    for found in together:
        assert not isinstance(found, Exception), found
        assert torch.equal(found[0], noise)
        for got, want in zip(found[2], seen, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
        assert all(torch.equal(found[3][name], p) for name, p in base.items())
    for step, want in enumerate(norms):
        got = {index: norm for found in together for index, norm in found[1][step].items()}
        assert got == pytest.approx(want, rel=1e-5)
    assert sum(found[4] for found in together) == size


def noise_alone(rank: int, world_size: int) -> torch.Tensor:
    _, model, optimizer, _ = private(rank, world_size, "sgd")
    return train(model, optimizer, [[]], steps=1)[0]


def test_each_rank_makes_its_shard_of_the_same_noise(ranks):
    alone = noise_alone(0, 1)
    assert alone.abs().min() > 0
    for found in ranks(noise_alone, 3):
        assert torch.equal(found, alone)


def moments(rank: int) -> tuple:
    _, model, optimizer, _ = private(rank, 3, "adamw")
    train(model, optimizer, [[rank]], steps=1)
    local = sum(optimizer.state[p]["exp_avg"].to_local().numel() for p in model.parameters())
    return local, sum(p.numel() for p in model.parameters()), [first_element(p) for p in model.parameters()]


def test_the_optimizers_state_is_sharded(ranks):
    found = ranks(moments)
    assert sum(local for local, *_ in found) == found[0][1]
    assert [of_rank[2][0] for of_rank in found] == [0, 4 * 7, 8 * 7]  # 11 rows in chunks of 4, 4, 3


def in_bfloat16(rank: int) -> list:
    policy = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    _, model, optimizer, _ = private(rank, 3, "sgd", policy=policy, noise_multiplier=0.0)
    return train(model, optimizer, [[rank]], steps=1)[0]


def test_mixed_precision_clips_in_float32(ranks):
    """The sum moves by at most C for each of the three samples, and goes the way of the float32 one."""
    _, model, optimizer, _ = private(0, 1, "sgd", noise_multiplier=0.0)
    exact = train(model, optimizer, [[0, 1, 2]], steps=1)[0]
    for found in ranks(in_bfloat16):
        assert found.norm() <= 0.5 * 3 / 3 * (1 + 1e-6)  # expected batch of 3
        assert torch.cosine_similarity(found, exact, dim=0) > 0.99


class Mixing(Net):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = super().forward(ids)
        return out - out.mean(0, keepdim=True)


class Bare(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(7))


class Around(Net):
    """Uses a layer's weight past the layer."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + F.linear(self.embed(ids), self.head.weight)


def refused(rank: int) -> list[str]:
    found = []
    for kind, batch in ((Mixing, [rank, rank + 3, rank + 6]), (Bare, [0]), (Around, [rank])):
        torch.manual_seed(0)
        model = fully_shard(kind())
        try:
            model, optimizer, _ = PrivacyEngine(accountant="rdp").make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                data_loader=DataLoader(data(), batch_size=3),
                noise_multiplier=0.0,
                max_grad_norm=0.5,
            )
            train(model, optimizer, [batch], steps=1)
            found.append("")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_what_cannot_be_kept_apart_is_refused(ranks):
    for mixing, bare, around in ranks(refused):
        assert "gradients of several samples meet" in mixing
        assert "no layer family serves its parameters" in bare and "Bare" in bare
        assert "outside of its own module's forward" in around and "head.weight" in around


class OneRow(Net):
    """Uses one row of a table past its module: a row that is in the shard of one rank."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + F.embedding(torch.zeros_like(ids), self.embed.weight).sum(-1, keepdim=True)


def past_the_module(rank: int, in_pieces: bool) -> tuple:
    torch.manual_seed(0)
    model = fully_shard(OneRow())
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, _ = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=3),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
    )
    before = [p.to_local().clone() for p in model.parameters()]
    x, _ = data().tensors
    message = ""
    try:
        for part in [[rank], []] if in_pieces else [[rank]]:
            optimizer.signal_skip_step(in_pieces and len(part) > 0)
            model(x[part])[..., 0].sum().backward()
            optimizer.step()
            if in_pieces:
                optimizer.zero_grad()
    except RuntimeError as error:
        message = str(error)
    moved = any(not torch.equal(p.to_local(), w) for p, w in zip(model.parameters(), before, strict=True))
    return message, moved, len(engine.accountant)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_gradient_past_a_module_is_refused_on_every_rank_before_anything_is_used(ranks, in_pieces):
    for message, moved, accounted in ranks(past_the_module, in_pieces):
        assert "'embed.weight' got a gradient outside of its own module's forward" in message
        assert not moved and accounted == 0


def with_physical_batches(rank: int, world_size: int) -> torch.Tensor:
    _, model, optimizer, loader = private(rank, world_size, "sgd")
    x, y = data().tensors
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=1, optimizer=optimizer) as physical:
        for indices in physical.batch_sampler:
            loss = F.cross_entropy(model(x[indices]).flatten(0, 1), y[indices].flatten(), reduction="sum")
            loss.div(max(1, len(indices))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([whole(p).flatten() for p in model.parameters()])


def test_ranks_run_equally_many_physical_batches(ranks):
    """With Opacus' own manager a rank that has one sample fewer would leave the others waiting."""
    alone = with_physical_batches(0, 1)
    for found in ranks(with_physical_batches, 3):
        torch.testing.assert_close(found, alone, rtol=2e-5, atol=2e-6)


def save_half_way(rank: int, folder: Path) -> None:
    engine, model, optimizer, loader = private(rank, 3, "adamw")
    train(model, optimizer, loader.batch_sampler, steps=3)
    extra = {"step": 3, "noise": optimizer.noise.state_dict()}
    for _ in range(2):  # the second replaces the first
        save_checkpoint(folder, engine=engine, module=model, optimizer=optimizer, extra=extra)


def masters_after_loading(rank: int, folder: Path) -> list:
    """Whether each float32 copy of a bfloat16 parameter comes back, and how many elements are here."""
    options = dict(dtype=torch.bfloat16, low_precision="master", loss_reduction="sum")
    engine, model, optimizer, loader = private(rank, 3, "adamw", **options)
    train(model, optimizer, loader.batch_sampler, steps=2)
    save_checkpoint(folder, engine=engine, module=model, optimizer=optimizer)
    first = {name: optimizer.original_optimizer.state[p] for name, p in model._module.named_parameters()}
    engine, model, optimizer, _ = private(rank, 3, "adamw", **options)
    load_checkpoint(folder, engine=engine, module=model, optimizer=optimizer)
    found = []
    for name, p in model._module.named_parameters():
        for part, value in first[name].items():
            got = optimizer.original_optimizer.state[p][part]
            found.append((name, part, got.dtype == value.dtype and torch.equal(whole(got), whole(value))))
    return found


def test_float32_copies_of_sixteen_bit_shards_come_back(ranks, tmp_path):
    for found in ranks(masters_after_loading, tmp_path / "checkpoint"):
        assert "master_param" in {part for _, part, _ in found}
        assert not [(name, part) for name, part, same in found if not same]


def go_on(rank: int, world_size: int, folder: Path) -> list:
    engine, model, optimizer, loader = private(rank, world_size, "adamw", noise_multiplier=0.7)
    extra = load_checkpoint(folder, engine=engine, module=model, optimizer=optimizer)
    optimizer.expect_no_samples()
    optimizer.step()
    renewed = optimizer.noise.key  # on all ranks the same, or they would have refused the step
    optimizer.zero_grad()
    engine, model, optimizer, loader = private(rank, world_size, "adamw", noise_multiplier=0.7)
    loader.batch_sampler.step = load_checkpoint(folder, engine=engine, module=model, optimizer=optimizer)["step"]
    optimizer.noise.load_state_dict(extra["noise"])  # the batches that follow are those of the run
    assert renewed not in (None, optimizer.noise.key)
    found = train(model, optimizer, loader.batch_sampler, steps=STEPS - 3)
    return [*found, engine.accountant.history]


def test_a_checkpoint_goes_on_at_any_number_of_ranks(ranks, tmp_path):
    uninterrupted = train_rank(0, 1, "adamw", {})
    ranks(save_half_way, tmp_path / "checkpoint")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    for found in [go_on(0, 1, tmp_path / "checkpoint"), *ranks(go_on, 3, tmp_path / "checkpoint")]:
        for got, want in zip(found[:-1], uninterrupted[3:-1], strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
        assert found[-1] == uninterrupted[-1]  # every step is accounted once
    with pytest.raises(ValueError, match="no whole checkpoint"):
        go_on(0, 1, tmp_path)

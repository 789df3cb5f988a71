"""torch.compile: the same norms and clipped sums as without, one graph for the model, nothing lost or counted twice."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import dpfast
from dpfast.clipping.thresholds import Clipping
from dpfast.model.private_model import FusedModule
from dpfast.planning.planner import Plan, Planner, Shape
from tests.helpers import engine_of, loader_of, make_private, sums_of
from tests.oracle import Verdict

WORDS, WIDTH, PLACES = 11, 8, 7
BOUND = 0.01  # clips every sample of these models


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rms, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.rms(x))))


class Decoder(nn.Module):
    """As GPT-2: positions that all samples share, and a head that is the embedding table."""

    def __init__(self, width: int = WIDTH, blocks: int = 1, checkpoints: bool | None = None):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(32, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.checkpoints = checkpoints

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1])[None])
        for block in self.blocks:
            x = block(x) if self.checkpoints is None else checkpoint(block, x, use_reentrant=self.checkpoints)
        return self.head(x)


class Twice(nn.Module):
    """One layer on the same input twice; the two calls get the same backprop."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.layer(x) + self.layer(x)).relu())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.norm(self.one(x).relu()))


class Pinned(Planner):
    def __init__(self, way: str):
        super().__init__()
        self.way = way

    def choose(self, name: str, shape: Shape) -> Plan:
        return Plan(self.way, shape.T, shape.d, shape.p, 0.0)


def loss_of(out: Tensor) -> Tensor:
    return out.log_softmax(-1).square().flatten(1).sum(1).mean()


def ids_of(*sizes: int, length: int = PLACES) -> list[Tensor]:
    return [torch.randint(0, WORDS, (size, length)) for size in sizes]


def rows_of(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, PLACES, WIDTH) for size in sizes]


Compile = Callable[[nn.Module], nn.Module]


class Pair:
    """A private model compiled and its twin that is not, given the same batches."""

    def __init__(self, model: nn.Module, compile: Compile, before: bool = False, loss_reduction: str = "mean"):
        twin = copy.deepcopy(model)
        options = dict(clipping=Clipping.flat(BOUND), loss_reduction=loss_reduction)
        self.plain = FusedModule(twin, **options)
        if before:
            self.private = self.called = FusedModule(compile(model), **options)
        else:
            self.private = FusedModule(model, **options)
            self.called = compile(self.private)

    def both(self, do: Callable[[nn.Module], object]) -> None:
        for model in (self.private, self.plain):
            do(model)

    def check(self, batch: Tensor, tolerance: float = 2e-5, backward: Callable[[Tensor], None] = Tensor.backward):
        found, expected = (
            self._sums(private, called, batch, backward)
            for private, called in ((self.private, self.called), (self.plain, self.plain))
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * BOUND)
        norm = torch.cat([x.flatten() for x in found[1:]]).norm()
        assert norm <= BOUND * len(batch) * (1 + 1e-6)
        assert norm > 0 or len(batch) == 0

    def _sums(self, private: FusedModule, called: nn.Module, batch: Tensor, backward: Callable) -> list[Tensor]:
        for p in private.parameters():
            p.summed_grad = p.grad = None
        private.clipped_sum.start_logical_batch()
        torch.manual_seed(1)
        backward(loss_of(called(batch)))
        assert all(p.grad is None for p in private.parameters())
        return [private.per_sample_gradient_norms.clone(), *sums_of(private).values()]


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    return CompileCounterWithBackend("aot_eager")


def compiling(counter: CompileCounterWithBackend, **options) -> Compile:
    return lambda model: torch.compile(model, backend=counter, **options)


@pytest.mark.parametrize("before", [False, True])
def test_one_graph_for_the_model_and_few_for_batches_of_all_sizes(counter, before):
    pair = Pair(Decoder(blocks=2), compiling(counter), before)
    pair.check(ids_of(4)[0])
    assert counter.frame_count == 1
    for batch in ids_of(5) if before else ids_of(5, 1, 0, 9):
        pair.check(batch)
    assert counter.frame_count <= 4  # this size, any size, one and none


def test_inductor_reuses_no_memory_that_a_form_keeps():
    pair = Pair(Decoder(32, blocks=1), torch.compile)
    pair.private.clipped_sum.planner, pair.plain.clipped_sum.planner = Pinned("ghost"), Pinned("ghost")
    for batch in ids_of(8, 8, length=16):
        pair.check(batch)


class Overwriting(nn.Module):
    """Its compiled backward writes zeros into the backprops of the first layer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(len(x))
        beside = self.two(x).index_put((rows, torch.full_like(rows, 2)), torch.zeros(()))
        return self.three(self.one(x) + beside)


@pytest.mark.parametrize("array", [False, True])
def test_inductor_writes_into_nothing_that_a_form_keeps(array):
    pair = Pair(Overwriting(), torch.compile)
    pair.private.clipped_sum.planner, pair.plain.clipped_sum.planner = Pinned("ghost"), Pinned("ghost")
    for batch in rows_of(8, 8):
        pair.check(torch.from_numpy(batch.numpy()) if array else batch)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_equal_calls_are_not_merged(backend):
    pair = Pair(Twice(), lambda model: torch.compile(model, backend=backend))
    for batch in rows_of(4, 5):
        pair.check(batch)


def test_against_the_oracle(counter):
    model = Decoder().double()
    (ids,) = ids_of(5)

    def loss(out: Tensor, _: Tensor) -> Tensor:
        return loss_of(out)

    verdict = Verdict(copy.deepcopy(model), (ids,), ids, loss)
    wrapped, _, _ = make_private(model, size=5, max_grad_norm=verdict.max_grad_norm)
    loss_of(torch.compile(wrapped, backend=counter)(ids)).backward()
    verdict.check_norms(wrapped.per_sample_gradient_norms)
    verdict.check_sums(sums_of(model))
    assert counter.frame_count == 1


def _inplace(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def _blocks(model: nn.Module) -> nn.Module:
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        block.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize(("compile", "before"), [(_inplace, True), (_inplace, False), (_blocks, False)])
def test_modules_compiled_in_place(compile, before):
    pair = Pair(Decoder(), compile, before)
    for batch in ids_of(4, 5):
        pair.check(batch)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_checkpoints(counter, whole, reentrant):
    pair = Pair(Decoder(checkpoints=reentrant), compiling(counter) if whole else _blocks)
    for batch in ids_of(4, 4):
        pair.check(batch)


def test_dynamic(counter):
    pair = Pair(Small(), compiling(counter, dynamic=True))
    for batch in rows_of(4, 5, 1):
        pair.check(batch)


def test_reduce_overhead():
    pair = Pair(Small(), lambda model: torch.compile(model, mode="reduce-overhead"))
    for batch in rows_of(4, 4):
        pair.check(batch)


def test_fullgraph_is_for_the_model_inside(counter):
    with pytest.raises(RuntimeError, match="compile without fullgraph=True"):
        compiling(counter, fullgraph=True)(Pair(Small(), lambda model: model).private)(rows_of(4)[0])
    pair = Pair(Small(), compiling(counter, fullgraph=True), before=True)
    for batch in rows_of(4, 5):
        pair.check(batch)


def test_frozen_layers_do_not_break_the_graph(counter):
    model = Decoder()
    for name, p in model.named_parameters():
        p.requires_grad_(".up." in name)
    pair = Pair(model, compiling(counter))
    pair.check(ids_of(4)[0])
    assert counter.frame_count == 1


def test_parameters_frozen_and_trained_again(counter):
    pair = Pair(Small(), compiling(counter))
    for k, batch in enumerate(rows_of(4, 4, 4)):
        pair.check(batch)
        pair.both(lambda model, k=k: [p.requires_grad_(i % 3 != k % 3) for i, p in enumerate(model.parameters())])


def test_parameters_cast_and_set(counter):
    """Casting gives a parameter a new place where its gradient arrives, and casting back another one."""
    pair = Pair(Small(), compiling(counter))
    for dtype in (torch.float32, torch.float64, torch.float32, torch.float64):
        pair.both(lambda model, dtype=dtype: model.to(dtype))
        pair.check(rows_of(4)[0].to(dtype))

    def load(model: nn.Module) -> None:
        torch.manual_seed(5)
        model.load_state_dict({name: torch.randn_like(x) for name, x in model.state_dict().items()})
        for p in model.parameters():
            p.data = torch.randn_like(p)

    pair.both(load)
    pair.check(rows_of(4)[0].double())


def test_a_parameter_replaced_by_another_is_refused(counter):
    pair = Pair(Small(), compiling(counter))
    (batch,) = rows_of(4)
    pair.check(batch)
    pair.private.load_state_dict({n: x.clone() for n, x in pair.private.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="make the model private again"):
        loss_of(pair.called(batch)).backward()


def test_steps_and_evaluations_in_between(counter):
    pair = Pair(Small(), compiling(counter))
    for batch in rows_of(4, 5, 4):
        pair.check(batch)

        def step(model: nn.Module) -> None:
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.summed_grad)

        pair.both(step)
        for training in (False, True):
            pair.called.train(training)
            with torch.no_grad():
                torch.testing.assert_close(pair.called(batch), pair.plain(batch))
    assert counter.frame_count <= 6  # two for training, the others for evaluation


def summed(batch: int) -> Callable[[Tensor], None]:
    """The backward of a mean over so many samples, made a sum."""
    return lambda mean: (mean * batch).backward()


def test_autocast(counter):
    """A compiled graph runs without the autocasting that it was traced under."""
    pair = Pair(Small(), compiling(counter), loss_reduction="sum")
    for batch in rows_of(4, 5):
        with torch.autocast("cpu", torch.bfloat16):
            pair.check(batch, tolerance=0.02, backward=summed(len(batch)))
    pair = Pair(Small(), compiling(counter))
    for model in (pair.called, pair.plain):
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(ValueError, match="gradients of bfloat16"),
        ):
            loss_of(model(batch)).backward()


def test_bare_parameters_and_modules_that_run_by_sample(counter):
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.layer = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.weight

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], -1)).transpose(0, 1)

    for model in (nn.Sequential(Scale(), nn.Linear(WIDTH, 3)), TimeFirst()):
        pair = Pair(model, compiling(counter))
        for batch in rows_of(4, 5, 1):
            pair.check(batch)


def test_convolutions(counter):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3, 2, groups=2))
    pair = Pair(nn.Sequential(model, nn.Flatten(), nn.Linear(64, 3)), compiling(counter))
    for size in (4, 0):
        pair.check(torch.randn(size, 3, 9, 9))
    assert counter.frame_count <= 4


def test_attention_module(counter):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(WIDTH, 2, batch_first=True), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    pair = Pair(Attention(), compiling(counter))
    for batch in rows_of(4):
        pair.check(batch)


def test_copies(counter):
    pair = Pair(Small(), compiling(counter))
    (batch,) = rows_of(4)
    pair.check(batch)
    for twin in (copy.deepcopy(pair.private), pickle.loads(pickle.dumps(pair.private))):
        twin.called = None
        again = Pair.__new__(Pair)
        again.private, again.plain = twin, pair.plain
        again.called = compiling(counter)(twin)
        again.check(batch)
    pair.check(batch)


def test_private_again(counter):
    model = Small()
    (batch,) = rows_of(4)
    compiled = compiling(counter)(model)
    for _ in range(2):
        private = FusedModule(model, clipping=Clipping.flat(BOUND))
        plain = FusedModule(copy.deepcopy(private).to_standard_module(), clipping=Clipping.flat(BOUND))
        pair = Pair.__new__(Pair)
        pair.private, pair.called, pair.plain = private, compiled, plain
        pair.check(batch)
        private.cleanup()


def test_backward_twice(counter):
    """Its samples would count twice."""

    def twice(loss: Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    with torch._functorch.config.patch(donated_buffer=False):
        pair = Pair(Small(), compiling(counter))
        (batch,) = rows_of(4)
        pair.check(batch)
        with pytest.raises(ValueError, match="a second backward pass over samples"):
            pair._sums(pair.private, pair.called, batch, twice)


def test_other_gradients_are_not_recorded(counter):
    pair = Pair(Small(), compiling(counter))
    (batch,) = rows_of(4)
    pair.check(batch)

    def after_inputs(loss: Tensor) -> None:
        assert torch.autograd.grad(loss, batch, retain_graph=True)[0].any()
        loss.backward()

    batch.requires_grad_()
    pair.check(batch, backward=after_inputs)
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad with respect to a parameter"):
        torch.autograd.grad(loss_of(pair.called(batch)), list(pair.private.parameters()), allow_unused=True)
    pair.check(batch)


def test_a_backward_that_failed_leaves_nothing(counter):
    pair = Pair(Small(), compiling(counter))
    (batch,) = rows_of(4)
    pair.check(batch)
    failing = [True]

    def fail(_: Tensor) -> None:
        if failing:
            raise ZeroDivisionError

    def again(loss: Tensor) -> None:
        with pytest.raises(ZeroDivisionError):
            loss.backward(retain_graph=True)
        failing.clear()
        loss.backward()
        failing.append(True)

    batch.requires_grad_().register_hook(fail)
    pair.check(batch, backward=again)
    failing.clear()
    pair.check(batch)


def test_outputs_that_only_some_losses_use(counter):
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x).relu()
            return self.one(h), self.two(h)

    pair = Pair(Heads(), compiling(counter))
    for which in (0, 1, 0):
        for model in (pair.private, pair.plain):
            for p in model.parameters():
                p.summed_grad = None
        (batch,) = rows_of(4)
        norms = []
        for model, called in ((pair.private, pair.called), (pair.plain, pair.plain)):
            model.clipped_sum.start_logical_batch()
            loss_of(called(batch)[which]).backward()
            norms.append(model.per_sample_gradient_norms)
        torch.testing.assert_close(*norms)
        torch.testing.assert_close(sums_of(pair.private), sums_of(pair.plain), check_dtype=False)


def train(
    compile: Compile, wrap_model: bool = True, ascent: object = None, physical: int | None = None
) -> list[Tensor]:
    """Weights after steps with noise that is the same in every run."""
    torch.manual_seed(3)
    model = Small()
    data = TensorDataset(torch.randn(24, PLACES, WIDTH), torch.randn(24, PLACES, 3))
    options = {} if ascent is None else {"ascent": ascent}
    result = make_private(
        model,
        lr=0.5,
        data_loader=DataLoader(data, batch_size=8),
        poisson_sampling=True,
        max_grad_norm=0.1,
        wrap_model=wrap_model,
        **options,
    )
    wrapped, optimizer, loader = (model, *result[1:]) if not wrap_model else result
    called = compile(wrapped)
    generator = getattr(loader.batch_sampler, "generator", None)
    torch.manual_seed(4) if generator is None else generator.manual_seed(4)

    def epoch(loader) -> None:
        for x, y in loader:
            optimizer.zero_grad()
            F.mse_loss(called(x), y).backward() if len(x) else (called(x).sum() * 0).backward()
            optimizer.step()

    for _ in range(2):
        if physical is None:
            epoch(loader)
        else:
            with BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer
            ) as smaller:
                epoch(smaller)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    "options",
    [{}, {"physical": 3}, {"ascent": "DPSAT"}],
    ids=["Poisson", "BatchMemoryManager", "DP-SAT"],
)
def test_training(counter, options):
    if options.get("ascent"):
        options = {"ascent": dpfast.DPSAT(rho=0.05)}
    torch.testing.assert_close(train(compiling(counter), **options), train(lambda model: model, **options))
    assert counter.frame_count <= 4


def test_training_without_a_wrapper(counter):
    torch.testing.assert_close(
        train(compiling(counter), wrap_model=False), train(lambda model: model, wrap_model=False)
    )


def test_data_parallel(counter, tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        model, twin = Small(), Small()
        twin.load_state_dict(model.state_dict())
        (batch,) = rows_of(4)
        sums = []
        for one, compile in ((model, compiling(counter)), (twin, lambda model: model)):
            parallel = nn.parallel.DistributedDataParallel(one)
            wrapped, _, _ = engine_of().make_private(
                module=parallel,
                optimizer=torch.optim.SGD(parallel.parameters(), lr=0.0),
                data_loader=loader_of(4),
                noise_multiplier=0.0,
                max_grad_norm=BOUND,
                poisson_sampling=False,
            )
            loss_of(compile(wrapped)(batch)).backward()
            sums.append(sums_of(one))
        torch.testing.assert_close(*sums)
    finally:
        torch.distributed.destroy_process_group()

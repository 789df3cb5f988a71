"""``dpfast.graphed``: a recorded step has the bits of one that is not, and is used for what it was made of alone."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpfast
from dpfast.clipping.functions import AutoS, CustomClipping
from dpfast.planning.planner import Planner
from tests.helpers import BF16, F16, F32, F64, engine_of, make_private, mse, sse, sums_of
from tests.oracle import Verdict
from tests.zoo import every_layer, specimen
from tests.zoo import loss_of as loss_of_layer

STEPS = 6  # the first is run as it is written, one of the others is looked at; the rest is replayed
REFUSED = {"EmbeddingBag with offsets": "cannot be recorded"}  # its shapes are in its values


def private(model: nn.Module, size: int, **options):
    options = dict(max_grad_norm=0.05, noise_multiplier=1.0, lr=0.1) | options
    wrapped, optimizer, _ = make_private(model, size=size, noise_generator=torch.Generator().manual_seed(1), **options)
    return wrapped, optimizer


class Twins:
    """A private model whose steps are recorded, and its twin whose are not, given the same batches.

    ``whole`` steps have their updates in the graph; ``make`` makes the optimizers.
    """

    def __init__(self, model: nn.Module, size: int, loss=mse, compiled=False, whole=False, make=None, **options):
        twin = copy.deepcopy(model)

        def one(model: nn.Module):
            return private(model, size, **({"optimizer": make(model)} if make else {}), **options)

        (self.model, self.optimizer), (self.twin, self.plain) = one(model), one(twin)
        self.loss, self.whole = loss, whole
        optimizer = self.optimizer if whole else None
        self.step = dpfast.graphed(self.model, self.private_loss, optimizer, compiled)

    def private_loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        *inputs, target = batch
        return self.loss(model(*inputs), target)

    def backward(self, *batch: Tensor) -> None:
        torch.manual_seed(5)
        loss = self.step(*batch)
        torch.manual_seed(5)
        expected = self.private_loss(self.twin, *batch)
        expected.backward()
        assert torch.equal(loss, expected.detach())
        assert torch.equal(self.model.per_sample_gradient_norms, self.twin.per_sample_gradient_norms)

    def update(self) -> None:
        if not self.whole:
            self.optimizer.step()
        self.plain.step()
        for p, q in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            assert torch.equal(p, q)
            assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)
        for optimizer in (self.optimizer, self.plain):
            optimizer.zero_grad()

    def both(self, do) -> None:
        do(self.model, self.optimizer)
        do(self.twin, self.plain)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))


def batch(seed: int, rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 7, 4, generator=generator), torch.randn(rows, 7, 3, generator=generator)


def train(twins: Twins, steps: int = STEPS, first: int = 0) -> int:
    """How many of the steps were replayed."""
    before = twins.step.replays
    for k in range(first, first + steps):
        twins.backward(*batch(k))
        twins.update()
    return twins.step.replays - before


@every_layer
def test_every_layer_to_the_bit(name):
    torch.manual_seed(0)
    model, inputs, target = specimen(name, 5, F32)
    twins = Twins(model.train(), 5, loss_of_layer(name), whole=True)
    if name in REFUSED:
        with pytest.raises(RuntimeError, match=REFUSED[name]):
            for _ in range(3):
                twins.step(*inputs, target)
        return
    for k in range(STEPS):
        torch.manual_seed(k)
        _, inputs, target = specimen(name, 5, F32)
        twins.backward(*inputs, target)
        twins.update()
    assert twins.step.updates == twins.step.replays >= STEPS - 3


@pytest.mark.parametrize(
    "options",
    [
        dict(clipping="per_layer"),
        dict(clipping="per_layer", max_grad_norm={"0": 0.1, "": 0.2}),
        *(dict(clipping_fn=name) for name in ("global", "automatic", "normalised", "psac")),
        dict(clipping_fn=dpfast.Global(threshold=3.0)),
        dict(ascent=dpfast.DPSAT(rho=0.1)),
        dict(ascent=dpfast.DPSATMomentum(rho=0.1)),
        dict(ascent=dpfast.DiSK()),
    ],
    ids=str,
)
@pytest.mark.parametrize("whole", [False, True])
def test_clipping_and_ascents_to_the_bit(options, whole):
    twins = Twins(small(), 5, whole=whole, **options)
    assert train(twins) >= STEPS - 4
    outside = isinstance(options.get("ascent"), dpfast.DiSK)
    assert twins.step.updates == (twins.step.replays if whole and not outside else 0)


def test_physical_batches_add_up():
    twins = Twins(small(), 5)
    for k in range(STEPS):
        for part in range(3):
            twins.backward(*batch(10 * k + part))
        twins.update()
    assert twins.step.replays > 2 * STEPS


def test_adaptive_clipping_moves_the_threshold_of_a_recorded_step():
    data = TensorDataset(*batch(0, rows=30))
    engine = engine_of()
    model = small()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=5),
        noise_multiplier=1.0,
        max_grad_norm=0.05,
        poisson_sampling=False,
        **dict(
            clipping="adaptive",
            target_unclipped_quantile=0.5,
            clipbound_learning_rate=0.2,
            max_clipbound=10.0,
            min_clipbound=0.01,
            unclipped_num_std=1.0,
        ),
    )
    step = dpfast.graphed(model, lambda model, x, y: mse(model(x), y))
    for x, y in loader:
        before = optimizer.max_grad_norm
        step(x, y)
        total = torch.cat([s.flatten() for s in sums_of(model).values()]).norm()
        assert total <= 5 * before * (1 + 1e-6)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.max_grad_norm != before
    assert step.replays >= 2


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_leaving_a_sample_out_moves_the_sum_by_at_most_c(dtype):
    """Through recorded steps alone: of the whole batch, and of each that is one sample smaller."""
    C, inputs, target = 0.05, *(x.to(dtype) for x in batch(3))
    model = small().to(dtype)
    wrapped, _ = private(model, 5, max_grad_norm=C, noise_multiplier=0.0, lr=0.0, loss_reduction="sum")
    step = dpfast.graphed(wrapped, lambda model, x, y: sse(model(x), y))

    def recorded(*given: Tensor) -> Tensor:
        for _ in range(4):
            for p in model.parameters():
                p.summed_grad = None
            wrapped.clipped_sum.start_logical_batch()
            wrapped.clipped_sum.batches.drop()
            before = step.replays
            step(*given)
            found = torch.cat([s.double().flatten() for s in sums_of(model).values()])
            if step.replays > before:
                return found
        raise AssertionError("never replayed")

    whole = recorded(inputs, target)
    for i in range(5):
        rest = [j for j in range(5) if j != i]
        assert (whole - recorded(inputs[rest], target[rest])).norm() <= C * (1 + 1e-6)


def test_against_the_oracle():
    model, (x, y) = small().double(), (part.double() for part in batch(0))
    verdict = Verdict(copy.deepcopy(model), (x,), y, mse)
    wrapped, optimizer = private(model, 5, max_grad_norm=verdict.max_grad_norm, lr=0.0, noise_multiplier=0.0)
    step = dpfast.graphed(wrapped, lambda model, x, y: mse(model(x), y))
    for _ in range(4):
        step(x, y)
        verdict.check_norms(wrapped.per_sample_gradient_norms)
        verdict.check_sums(sums_of(model))
        optimizer.step()
        optimizer.zero_grad()
    assert step.replays


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_sample_that_is_not_finite_contributes_nothing(bad):
    twins = Twins(small(), 5)
    train(twins)
    x, y = batch(50)
    x[2, 0, 0] = bad
    before = twins.step.replays
    with pytest.warns(RuntimeWarning, match="contributes exact zeros"):
        twins.step(x, y)
    mse(twins.twin(x), y).backward()
    assert twins.step.replays == before
    assert twins.model.nonfinite_samples == twins.twin.nonfinite_samples == 1
    twins.update()
    assert train(twins, 2, first=60) == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_padding_contributes_nothing(compiled):
    data = TensorDataset(*batch(0, rows=40))

    def run(graph: bool) -> tuple[list[Tensor], int]:
        model = small()
        model, optimizer, loader = engine_of().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=0.05,
            noise_generator=torch.Generator().manual_seed(1),
        )
        step = dpfast.graphed(model, lambda model, x, y: mse(model(x), y), compiled=compiled)
        torch.manual_seed(3)
        with dpfast.BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=6, optimizer=optimizer, pad=graph
        ) as physical:
            for x, y in physical:
                if graph:
                    step(x, y)
                else:
                    mse(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()], step.recorded

    # A mean over a padded batch is divided by its size, and so is multiplied by it again: the clipped sum is the same.
    (found, recorded), (expected, _) = run(True), run(False)
    assert recorded == 1
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [6, 2048])  # large sums are made before the backward pass has ended
def test_a_compiled_step_is_within_rounding(width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, 3))
    twin = copy.deepcopy(model)
    (model, optimizer), (twin, plain) = private(model, 5), private(twin, 5)
    step = dpfast.graphed(model, lambda model, x, y: mse(model(x), y), optimizer, compiled=True)
    for k in range(STEPS):
        x, y = batch(k)
        step(x, y)
        mse(twin(x), y).backward()
        plain.step()
        plain.zero_grad()
    assert step.updates == step.replays >= STEPS - 3
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_sums_at_indices_are_not_left_to_the_compiler():
    """Inductor read sums of max pooling before they were made: the second convolution had backprops of zero."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # else a batch of another size is compiled for all sizes
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(16, 32, 4, 2), nn.ReLU()),
        *(nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10)),
    )
    x, y = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
    twin = copy.deepcopy(model)
    (model, _), (twin, _) = private(model, 64, lr=0.0), private(twin, 64, lr=0.0)
    F.cross_entropy(torch.compile(model)(x), y).backward()
    F.cross_entropy(twin(x), y).backward()
    for one, other in zip(sums_of(model).values(), sums_of(twin).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert "adds up at indices" in dpfast.explain(model, x)


def test_dropout_draws_anew():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    twins = Twins(model.train(), 5)
    assert train(twins) >= STEPS - 3
    x, y = batch(70)
    torch.manual_seed(1)
    losses = set()
    for _ in range(3):
        losses.add(twins.step(x, y).item())
        twins.optimizer.zero_grad()
    assert len(losses) == 3


GUARDS = {
    "shape": lambda model, optimizer: None,
    "requires_grad": lambda model, optimizer: model.get_parameter("0.weight").requires_grad_(False),
    "function": lambda model, optimizer: setattr(optimizer.clipping, "function", AutoS()),
    "plan": lambda model, optimizer: setattr(model.clipped_sum, "planner", Planner(memory_budget=0)),
    "parts in eval()": lambda model, optimizer: model.get_submodule("1").eval(),
    "another parameter": lambda model, optimizer: _replace(model),
}


def _replace(model: nn.Module) -> None:
    """A parameter of another memory, as ``.data =`` makes it."""
    weight = model.get_parameter("0.weight")
    weight.data = weight.data.clone()


@pytest.mark.parametrize("guard", GUARDS)
def test_a_stale_graph_is_not_used(guard):
    twins = Twins(small(), 5)
    train(twins)
    recorded = twins.step.recorded
    twins.both(GUARDS[guard])
    for k in range(3):
        x, y = batch(80 + k, rows=6 if guard == "shape" else 5)
        twins.backward(x, y)
        twins.update()
    assert (twins.step.recorded > recorded) == (guard != "another parameter")


def test_a_clip_scheduler_needs_no_other_graph():
    twins = Twins(small(), 5)
    train(twins)
    recorded = twins.step.recorded
    for k in range(3):
        twins.both(lambda model, optimizer: setattr(optimizer, "max_grad_norm", 0.9 * optimizer.max_grad_norm))
        twins.backward(*batch(90 + k))
        twins.update()
    assert twins.step.recorded == recorded


def test_a_clipping_function_of_ones_own_is_asked_every_time():
    twins, share = Twins(small(), 4), {"of": 0.5}
    function = CustomClipping(lambda n: share["of"] * 0.05 / n.clamp_min(0.05), 0.05)
    twins.both(lambda model, _: setattr(model.clipped_sum.clipping, "function", function))
    for step in range(STEPS):
        share["of"] = 0.25 if step > STEPS // 2 else 0.5
        twins.backward(torch.randn(4, 4), torch.randn(4, 3))
        twins.update()
    assert twins.step.replays == 0


def test_evaluation_is_not_recorded():
    twins = Twins(small(), 5)
    train(twins)
    twins.model.eval()
    before = twins.step.replays
    for _ in range(3):
        twins.step(*batch(95))
    assert twins.step.replays == before
    with pytest.raises(ValueError, match="eval"):
        twins.optimizer.step()


def test_an_empty_batch_is_a_step():
    twins = Twins(small(), 5)
    train(twins)
    for _ in range(3):
        twins.both(lambda model, optimizer: optimizer.expect_no_samples())
        twins.step(*batch(0, rows=0))
        mse(twins.twin(batch(0, rows=0)[0]), batch(0, rows=0)[1]).backward()
        twins.update()


def test_the_same_samples_do_not_count_twice():
    twins = Twins(small(), 5)
    train(twins)
    x, y = batch(97)
    twins.step(x, y)
    with pytest.raises(ValueError, match="second backward pass"):
        twins.step(x, y)
    twins.optimizer.zero_grad()
    assert train(twins, 1, first=98) >= 0


def test_what_cannot_be_recorded_is_refused_by_name():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if bool((x > -100).all()) else self.layer(-x)

    model, optimizer = private(Branch(), 5, public_state=[])
    step = dpfast.graphed(model, lambda model, x, y: mse(model(x), y))
    with pytest.raises((RuntimeError, ValueError)) as refusal:
        for k in range(3):
            step(*batch(k))
            optimizer.step()
            optimizer.zero_grad()
    assert "recorded" in str(refusal.value) or "one sample at a time" in str(refusal.value)


def test_the_model_is_called_with_the_batch():
    model, _ = private(small(), 5)
    step = dpfast.graphed(model, lambda model, x, y: mse(model(x + 1), y))
    with pytest.raises(ValueError, match="tensors of the batch as they are"):
        step(*batch(0))
    twice = dpfast.graphed(model, lambda model, x, y: mse(model(x), y) + mse(model(x), y))
    with pytest.raises(ValueError, match="call the model once"):
        twice(*batch(0))


def test_a_tensor_beside_the_batch_is_not_taken_for_constant():
    """It would stay that of the samples with which the step was recorded."""
    model, optimizer = private(small(), 5)
    target = batch(0)[1]
    step = dpfast.graphed(model, lambda model, x: mse(model(x), target))
    with pytest.raises(RuntimeError, match="give it to the call"):
        for k in range(4):
            x, target = batch(k)
            step(x)
            optimizer.step()
            optimizer.zero_grad()


def test_constants_of_the_loss_are_let_in():
    weights = torch.tensor([1.0, 2.0, 3.0])
    twins = Twins(small(), 5, lambda out, target: mse(out * weights, target))
    assert train(twins) >= STEPS - 3


def test_models_that_cannot_be_recorded():
    with pytest.raises(ValueError, match="Linear is not a private model"):
        dpfast.graphed(nn.Linear(2, 2), F.mse_loss)
    model, _ = private(small(), 5)
    with pytest.raises(ValueError, match="compiled"):
        dpfast.graphed(torch.compile(model), F.mse_loss)


def test_the_example_of_the_page_runs(capsys):
    page = (Path(__file__).parents[1] / "docs" / "compile.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    assert int(capsys.readouterr().out.split()[0]) > 10


@pytest.mark.gpu
def test_a_cuda_graph():
    """On a GPU the step is captured: within the rounding of kernels that are chosen by shape."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    model = small().cuda()
    twin = copy.deepcopy(model)
    (model, optimizer), (twin, plain) = private(model, 5), private(twin, 5)
    step = dpfast.graphed(model, lambda model, x, y: mse(model(x), y))
    for k in range(2 * STEPS):
        x, y = (part.cuda() for part in batch(k))
        step(x, y)
        mse(twin(x), y).backward()
        for each in (optimizer, plain):
            each.step()
            each.zero_grad()
    assert step.replays >= STEPS
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)

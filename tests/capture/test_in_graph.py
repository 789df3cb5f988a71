"""Layers inside of Inductor's graph, clipped at its end: what is replayed is exact, within C, and never stale."""

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import dpfast
from dpfast.capture.graph_calls import GraphCalls
from dpfast.clipping import at_once, clipped_sum
from dpfast.clipping.functions import PSAC, Abadi, AutoS, AutoV, ClippingFunction, CustomClipping, Global
from dpfast.clipping.thresholds import Clipping
from dpfast.model.private_model import FusedModule
from tests.capture.test_compiled_tap import BOUND, WIDTH, WORDS, Pair, Pinned, ids_of, loss_of, rows_of
from tests.helpers import BF16, F16, F32, F64, SLACK, distance, loader_of, make_private, sums_of
from tests.oracle import Verdict

SIZE = 4
PASSES = 4  # recorded, at once, traced and replayed, replayed


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch._inductor.config.patch("aot_inductor.debug_compile", True):  # less time in the C++ compiler
        yield
    torch._dynamo.reset()


class Ends(list):
    """The graphs whose end has clipped at once; ``replays`` of them were replayed, and ``traces`` traced."""

    replays = traces = 0

    def since(self) -> tuple[int, int]:
        """How many ends there were, and how many of them were replayed, since it was last asked."""
        found = len(self), self.replays
        self.clear()
        self.replays = 0
        return found


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Ends:
    seen = Ends()
    end, trace = clipped_sum.end_at_once, at_once.traced

    def replayed(*_: Any) -> None:
        seen.replays += 1

    def traced(*args: Any) -> Any:
        seen.traces += 1
        module = trace(*args)
        module.register_forward_hook(replayed)
        return module

    def ended(graph: GraphCalls, *args: Any) -> Any:
        seen.append(graph)
        return end(graph, *args)

    monkeypatch.setattr(at_once, "traced", traced)
    monkeypatch.setattr(clipped_sum, "end_at_once", ended)
    return seen


class Two(nn.Module):
    """No operator of it needs a kernel of its own: it is compiled in no time."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Tied(nn.Module):
    """The head is the embedding table, a layer is called twice, and what is between is computed again if ``again``."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.words, self.norm, self.mix = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.again = again

    def between(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(self.mix(x)).relu())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = checkpoint(self.between, x, use_reentrant=False) if self.again else self.between(x)
        return self.head(x)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, dynamic=False)


def summed(out: Tensor) -> Tensor:
    """A loss that is a sum over samples."""
    return loss_of(out.float() if out.dtype in (BF16, F16) else out) * len(out)


def other_loss(out: Tensor) -> Tensor:
    return (out.sin() * torch.arange(out.shape[-1])).flatten(1).sum(1).mean()


def clear(*models: FusedModule) -> None:
    """As after a step."""
    for model in models:
        for p in model.parameters():
            p.summed_grad = p.grad = None
        model.clipped_sum.start_logical_batch()
        model.clipped_sum.batches.start_step()


def sums(model: FusedModule, called: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    clear(model)
    loss(called(x)).backward()
    return sums_of(model)


def primed(model: nn.Module, ends: Ends, compile: Callable[[nn.Module], nn.Module] = compiled, **options: Any) -> Pair:
    """A compiled model whose passes are replayed, and its twin."""
    pair = Pair(model, compile, **options)
    for batch in rows_of(*[SIZE] * PASSES):
        pair.check(batch)
    assert ends.since() == (PASSES - 1, PASSES - 2)
    return pair


def leaving_one_out_is_within(
    model: FusedModule, called: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample by sample, what it adds to the sum is at most the sensitivity; its row is one that no sample is in."""
    sensitivity = model.clipped_sum.clipping.sensitivity
    whole = sums(model, called, x, loss)
    moves = []
    for row in range(len(x)):
        with monkeypatch.context() as patch:
            patch.setattr(model.clipped_sum.batches, "padding", lambda _, row=row: [row], raising=False)
            moves.append(distance(whole, sums(model, called, x, loss)))
    assert max(moves) <= sensitivity * SLACK, f"a sample moved the clipped sum by {max(moves) / sensitivity} C"
    assert min(moves) > 0


# ---------------------------------------------------------------------- exact and within C


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpoint"])
def test_replays_are_the_oracle_of_tied_weights(ends, again):
    model = Tied(again).double()
    private = FusedModule(copy.deepcopy(model), clipping=Clipping.flat(BOUND))
    called = compiled(private)
    for ids in ids_of(*[SIZE] * PASSES):
        for bound in (None, BOUND):
            verdict = Verdict(model, (ids,), ids, lambda out, _: loss_of(out), bound)
            private.clipped_sum.clipping.sensitivity = verdict.max_grad_norm
            sums(private, called, ids, loss_of)
            verdict.check_norms(private.per_sample_gradient_norms)
            verdict.check_sums(sums_of(private._module))
    assert ends.since() == (2 * PASSES - 1, 2 * PASSES - 2)
    assert ends.traces == 1  # thresholds are no part of what is traced


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_a_sample_left_out_moves_the_sum_by_c_at_most(ends, monkeypatch, dtype):
    private = FusedModule(Two().to(dtype), clipping=Clipping.flat(BOUND), loss_reduction="sum")
    called = compiled(private)
    batches = [x.to(dtype) for x in rows_of(*[SIZE] * 3)]
    for x in batches:
        sums(private, called, x, summed)
    leaving_one_out_is_within(private, called, batches[-1], summed, monkeypatch)
    assert ends.since() == (SIZE + 3, SIZE + 2)
    whole, moves = sums(private, called, batches[-1], summed), []
    for row in range(SIZE):
        rest = torch.cat([batches[-1][:row], batches[-1][row + 1 :]])
        for _ in range(3):
            moves.append(distance(whole, sums(private, called, rest, summed)))
    assert max(moves) <= BOUND * SLACK
    assert ends.since() == (3 * SIZE, 3 * SIZE - 1)


GROUPED = {"one": BOUND, "two": 2 * BOUND}
STYLES: dict[str, Callable[[FusedModule], Clipping]] = {
    "flat": lambda model: Clipping.flat(BOUND),
    "per layer": lambda model: Clipping.per_layer(BOUND, dict(model._module.named_parameters())),
    "grouped": lambda model: Clipping.per_layer(GROUPED, dict(model._module.named_parameters())),
}
FUNCTIONS = [Abadi(), AutoS(0.1), AutoV(), PSAC(), Global(), Global(1e4)]


def test_every_clipping_function_and_style(ends, monkeypatch):
    pair = primed(Two(), ends)
    for style in STYLES.values():
        for function in FUNCTIONS:
            for model in (pair.private, pair.plain):
                model.clipped_sum.clipping = style(model)
                model.clipped_sum.clipping.function = function
            for x in rows_of(SIZE, SIZE, SIZE):
                found = sums(pair.private, pair.called, x, loss_of)
                torch.testing.assert_close(found, sums(pair.plain, pair.plain, x, loss_of), rtol=2e-5, atol=1e-7)
            assert ends.since() == (3, 2)
            if function != Global():  # which leaves all of these out
                leaving_one_out_is_within(pair.private, pair.called, x, loss_of, monkeypatch)
                assert ends.since() == (SIZE + 1, SIZE + 1)


def test_backward_passes_of_one_step_add_up(ends):
    pair = primed(Two(), ends)
    batches = rows_of(*[SIZE] * 3)
    expected = [sums(pair.plain, pair.plain, x, loss_of) for x in batches]
    clear(pair.private)
    for x in batches:
        loss_of(pair.called(x)).backward()
    whole = {name: sum(each[name] for each in expected) for name in expected[0]}
    torch.testing.assert_close(sums_of(pair.private), whole, rtol=2e-5, atol=1e-7)
    assert ends.since() == (3, 3)
    assert pair.private.clipped_sum.in_force == [BOUND]


def test_a_loss_that_is_scaled(ends):
    pair = primed(Two(), ends)
    (x,) = rows_of(SIZE)
    expected = sums(pair.plain, pair.plain, x, loss_of)
    for scale in (2.0**12, 2.0**12, 2.0**10, 2.0**12):
        pair.private.clipped_sum.loss_scale = scale
        found = sums(pair.private, pair.called, x, lambda out, scale=scale: loss_of(out) * scale)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
    assert ends.since() == (4, 2)


def test_autocast(ends):
    pair = Pair(Two(), compiled, loss_reduction="sum")
    for x in rows_of(*[SIZE] * PASSES):
        with torch.autocast("cpu", BF16):
            found = sums(pair.private, pair.called, x, summed)
            expected = sums(pair.plain, pair.plain, x, summed)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2 * BOUND)
    assert ends.since() == (PASSES - 1, PASSES - 2)


def test_a_mean_in_16_bits_is_refused_in_a_replay_too(ends):
    private = FusedModule(Two().bfloat16(), clipping=Clipping.flat(BOUND))
    called = compiled(private)
    for x in rows_of(*[SIZE] * PASSES):
        with pytest.raises(ValueError, match="loss_reduction='mean' with gradients of bfloat16"):
            sums(private, called, x.bfloat16(), loss_of)
        assert not any(x.any() for x in sums_of(private).values())
    assert ends.since() == (PASSES - 1, PASSES - 2)


def test_convolutions_whose_weights_are_laid_out_anew(ends):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3, 2), nn.Flatten(), nn.Linear(243, 3))
    pair = Pair(model, compiled)
    for _ in range(PASSES):
        pair.check(torch.randn(SIZE, 3, 6, 6))
    assert ends.since() == (PASSES - 1, PASSES - 2)
    pair.private.load_state_dict({n: x.clone() for n, x in pair.private.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="make the model private again"):
        loss_of(pair.called(torch.randn(SIZE, 3, 6, 6))).backward()


# ---------------------------------------------------------------------- rows that do not count


@pytest.mark.parametrize("way", ["ghost", "instantiate"])
def test_a_sample_that_is_not_finite_is_contained(ends, way):
    pair = primed(Two(), ends)
    for model in (pair.private, pair.plain):
        model.clipped_sum.planner = Pinned(way)
    for bad in (None, None, float("nan"), float("inf"), None):
        (x,) = rows_of(SIZE)
        if bad is not None:
            x[1] = bad
        found, expected = (
            sums(model, called, x, loss_of) for model, called in ((pair.private, pair.called), (pair.plain, pair.plain))
        )
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
        assert all(x.isfinite().all() and x.any() for x in found.values())
    assert ends.since() == (5, 4)
    assert pair.private.clipped_sum.nonfinite_samples == 2


class Unit(nn.Module):
    """Its output for a row of zeros is NaN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x / x.norm(dim=(1, 2), keepdim=True)))


@pytest.mark.parametrize("model", [Two(96), Unit(96)], ids=["finite", "NaN"])
def test_padding_adds_nothing(ends, model):
    """Nor where the model makes NaN of it, and forms are so large that they are multiplied and not left out."""
    model = copy.deepcopy(model)
    data = TensorDataset(torch.randn(12, 32, 96), torch.randn(12, 32, 3))
    twin = copy.deepcopy(model)
    runs = []
    for one, compile in ((model, compiled), (twin, lambda model: model)):
        wrapped, optimizer, loader = make_private(
            one, lr=0.1, data_loader=DataLoader(data, batch_size=4), poisson_sampling=True, max_grad_norm=0.1
        )
        loader.batch_sampler.generator.manual_seed(1) if loader.batch_sampler.generator else torch.manual_seed(1)
        wrapped.clipped_sum.planner = Pinned("ghost")
        called, seen = compile(wrapped), []
        with dpfast.BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=6, optimizer=optimizer, pad=True
        ) as physical:
            for _ in range(2):
                for x, y in physical:
                    optimizer.zero_grad()
                    torch.nn.functional.mse_loss(called(x), y).backward()
                    seen.append(sums_of(one))
                    optimizer.step()
        runs.append(seen)
    assert ends.since()[1] > 1
    assert len(runs[0]) == len(runs[1]) > PASSES
    for found, expected in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------- nothing stale


def test_a_batch_of_another_shape(ends):
    pair = primed(Two(), ends)
    for x in rows_of(SIZE + 1, SIZE, SIZE, 1, 1, SIZE):
        pair.check(x)
    assert [len(graph.calls) for graph in ends] == [2, 2]
    assert ends.since() == (2, 1)


def test_parameters_frozen_and_trained_again(ends):
    pair = primed(Two(), ends)
    for frozen in (True, False):
        ends.since()
        pair.both(lambda model, frozen=frozen: model._module.two.requires_grad_(not frozen))
        for x in rows_of(SIZE, SIZE):
            pair.check(x)
            assert (getattr(pair.private._module.two.weight, "summed_grad", None) is None) == frozen
    assert ends.since() == (1, 1)  # of the graph of before


def test_an_optimizer_of_some_parameters_and_then_of_others(ends):
    pair = primed(Two(), ends)
    for part in ("one", "two"):
        pair.both(lambda model, part=part: setattr(model.clipped_sum, "tracked", parameters_of(model, part)))
        for x in rows_of(*[SIZE] * 3):
            found = sums(pair.private, pair.called, x, loss_of)
            torch.testing.assert_close(found, sums(pair.plain, pair.plain, x, loss_of), rtol=2e-5, atol=1e-7)
        assert ends.since() == (3, 2)
    pair.both(lambda model: setattr(model.clipped_sum, "tracked", set()))
    assert not any(x.any() for x in sums(pair.private, pair.called, x, loss_of).values())


def parameters_of(model: FusedModule, part: str) -> set[nn.Parameter]:
    return set(getattr(model._module, part).parameters())


def test_another_planner_and_plans_that_are_loaded(ends):
    pair = primed(Two(), ends)
    for way in ("instantiate", "ghost"):
        pair.private.clipped_sum.planner = Pinned(way)
        pair.check(rows_of(SIZE)[0])
        assert ends.since() == (1, 0)
    planner = pair.private.clipped_sum.planner
    for expected in ((2, 1), (2, 1)):
        planner.load_state_dict(planner.state_dict())
        for x in rows_of(SIZE, SIZE):
            pair.check(x)
        assert ends.since() == expected


def test_thresholds_that_change_are_followed(ends):
    pair = primed(Two(), ends)
    for bound in (BOUND / 3, BOUND / 7):
        pair.both(lambda model, bound=bound: setattr(model.clipped_sum.clipping, "sensitivity", bound))
        (x,) = rows_of(SIZE)
        found = sums(pair.private, pair.called, x, loss_of)
        torch.testing.assert_close(found, sums(pair.plain, pair.plain, x, loss_of), rtol=2e-5, atol=1e-7)
        assert ends.since() == (1, 1)
        assert pair.private.clipped_sum.in_force == [bound]


@dataclass
class Mine(ClippingFunction):
    """It may change, so that it has no hash."""

    share: float = 0.5

    def factors(self, squared: Tensor, bounds: Tensor, thresholds: Tensor, scale: float) -> Tensor:
        return self.share * AutoV().factors(squared, bounds, thresholds, scale)


def test_functions_that_may_change_are_never_replayed(ends):
    pair = primed(Two(), ends)
    (x,) = rows_of(SIZE)
    share = {"of": 0.5}
    custom = CustomClipping(lambda n: share["of"] * BOUND / n.clamp_min(BOUND), BOUND)
    for function in (custom, Mine()):
        pair.private.clipped_sum.clipping.function = function
        share["of"] = 0.5
        for _ in range(3):
            half = sums(pair.private, pair.called, x, loss_of)
        share["of"] = 0.25
        if function is not custom:
            function.share = 0.25
        quarter = sums(pair.private, pair.called, x, loss_of)
        torch.testing.assert_close(quarter, {name: one / 2 for name, one in half.items()})
        assert ends.since() == (4, 0)


def test_evaluations_in_between(ends):
    pair = primed(Two(), ends)
    (x,) = rows_of(SIZE)
    for _ in range(2):
        pair.both(nn.Module.eval)
        loss_of(pair.called(x)).backward()
        assert all(p.grad is not None for p in pair.private.parameters())
        with torch.no_grad():
            torch.testing.assert_close(pair.called(x), pair.plain(x))
        assert ends.since() == (0, 0)
        pair.both(nn.Module.train)
        pair.private.clipped_sum.evaluated = False
        pair.check(x)
        assert ends.since() == (1, 1)


def test_an_ascent(ends):
    """Gradients are taken at shifted weights, another one each step; a forward in between changes nothing."""
    weights = []
    for compile in (compiled, lambda model: model):
        torch.manual_seed(1)
        model = Two()
        wrapped, optimizer, _ = make_private(
            model, size=SIZE, lr=0.5, max_grad_norm=0.1, ascent=dpfast.DPSAT(rho=0.05), loss_reduction="mean"
        )
        called = compile(wrapped)
        for k, x in enumerate(rows_of(*[SIZE] * 6)):
            optimizer.zero_grad()
            loss = loss_of(called(x))
            if k == 4:
                called(x)
            loss.backward()
            optimizer.step()
        weights.append(dict(model.named_parameters()))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    assert ends.since()[1] >= 2


def test_two_forwards_in_one_pass(ends):
    pair = primed(Two(), ends)
    (x,) = rows_of(SIZE)

    def both_losses(model: FusedModule, called: nn.Module) -> dict[str, Tensor]:
        clear(model)
        (loss_of(called(x)) + other_loss(called(x))).backward()
        return sums_of(model)

    for _ in range(2):
        found, expected = both_losses(pair.private, pair.called), both_losses(pair.plain, pair.plain)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
        assert ends.since() == (0, 0)


def test_two_forwards_that_are_seen_too_late_are_refused_once(ends):
    """A forward before another one's backward: when the graph ends, nothing tells that it is run once more."""
    pair = primed(Two(), ends)
    (x,) = rows_of(SIZE)

    def late(model: FusedModule, called: nn.Module) -> None:
        clear(model)
        first, second = called(x), called(x)
        loss_of(first).backward()
        clear(model)
        (loss_of(second) + other_loss(called(x))).backward()

    with pytest.raises(ValueError, match="Nothing of it was summed"):
        late(pair.private, pair.called)
    assert not any(x.any() for x in sums_of(pair.private).values())
    late(pair.private, pair.called)
    late(pair.plain, pair.plain)
    torch.testing.assert_close(sums_of(pair.private), sums_of(pair.plain), rtol=2e-5, atol=1e-7)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Shared(nn.Module):
    """One block twice over."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(WIDTH, WIDTH).requires_grad_(False), Body()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.first(x).requires_grad_()))


def _block_alone(model: nn.Module) -> nn.Module:
    model._module.block.compile(dynamic=False)
    return model


def test_a_graph_that_runs_twice_in_a_pass_is_recorded(ends):
    pair = Pair(Shared(), _block_alone)
    for x in rows_of(*[SIZE] * PASSES):
        pair.check(x)
    assert ends.since() == (0, 0)
    assert len(pair.private.clipped_sum.graphs) == 1


class Deeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(WIDTH, WIDTH), Body()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x).requires_grad_())


def test_a_layer_outside_of_the_graph_that_is_trained_later(ends):
    pair = Pair(Deeper(), _block_alone)
    for trains, expected in ((False, (2, 1)), (True, (0, 0)), (False, (2, 2))):
        pair.both(lambda model, trains=trains: model._module.first.requires_grad_(trains))
        for x in rows_of(*[SIZE] * 3):
            pair.check(x)
        assert ends.since() == expected


def test_gradients_of_inputs_are_no_backward_pass(ends):
    """Not one that a Poisson batch has already had."""
    wrapped, optimizer, _ = make_private(
        Two(), size=64, poisson_sampling=True, data_loader=loader_of(64, SIZE), max_grad_norm=BOUND
    )
    called = compiled(wrapped)
    with torch._functorch.config.patch(donated_buffer=False):
        for x in rows_of(*[SIZE] * PASSES):
            loss = loss_of(called(x.requires_grad_()))
            assert torch.autograd.grad(loss, x, retain_graph=True)[0].any()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert ends.since() == (PASSES - 1, PASSES - 2)


def test_a_second_backward_of_the_same_samples_is_refused(ends):
    with torch._functorch.config.patch(donated_buffer=False):
        pair = primed(Two(), ends)
        clear(pair.private)
        loss = loss_of(pair.called(rows_of(SIZE)[0]))
        loss.backward(retain_graph=True)
        with pytest.raises(ValueError, match="a second backward pass over samples"):
            loss.backward()


def test_a_backward_that_failed_leaves_nothing(ends):
    with torch._functorch.config.patch(donated_buffer=False):
        pair = Pair(Two(), compiled)
        for x in rows_of(SIZE, SIZE, SIZE):
            pair.check(x.requires_grad_())
        assert ends.since() == (2, 1)
        clear(pair.private)
        loss = loss_of(pair.called(x))

        def fail(_: Tensor) -> None:
            raise ZeroDivisionError

        hook = x.register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            loss.backward(retain_graph=True)
        assert ends.since() == (1, 1)
        hook.remove()
        loss.backward()
        expected = sums(pair.plain, pair.plain, x, loss_of)
        torch.testing.assert_close(sums_of(pair.private), expected, rtol=2e-5, atol=1e-7)


def test_a_check_within_a_pass_keeps_what_was_summed(ends):
    pair = primed(Two(), ends)
    recorder = pair.private.clipped_sum
    recorder._ended = kept = object()
    state = recorder.suspend()
    assert recorder._ended is None
    recorder.resume(state)
    assert recorder._ended is kept
    recorder.take()


def test_copies_have_graphs_of_their_own(ends):
    pair = primed(Two(), ends)
    for twin in (copy.deepcopy(pair.private), pickle.loads(pickle.dumps(pair.private))):
        assert not twin.clipped_sum.graphs
        again = Pair.__new__(Pair)
        again.private, again.called, again.plain = twin, compiled(twin), pair.plain
        for x in rows_of(SIZE, SIZE):
            again.check(x)
        ends.since()
    pair.check(rows_of(SIZE)[0])


def test_no_two_processes_have_taps_of_one_handle():
    """Compilers keep code in files, and find it again by its constants: one process would run that of another."""
    private = FusedModule(Two(), clipping=Clipping.flat(BOUND))
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        handles = [tap.handle for tap in taps_of(private)] + [tap.handle for tap in taps_of(fresh())]
        os.write(writing, " ".join(handles).encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 10000).decode().split()
    ours = [tap.handle for tap in taps_of(private)] + [tap.handle for tap in taps_of(fresh())]
    assert len(theirs) == len(ours) == 4
    assert not set(theirs) & set(ours)


def fresh() -> FusedModule:
    return FusedModule(Two(), clipping=Clipping.flat(BOUND))


def taps_of(model: FusedModule) -> list[Any]:
    from dpfast.capture.tap import taps

    return list({id(tap): tap for tap in taps.values() if tap.recorder is model.clipped_sum}.values())

"""The planner: the fastest way by prediction, within the memory budget, as pinned, the same in every pass."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from dpfast.planning import clock, planner, rates, unmeasured
from dpfast.planning.planner import Planner, Shape, choices, predicted
from dpfast.planning.unmeasured import Rates
from tests.helpers import engine_of, make_private

CPU = torch.device("cpu")
F32 = torch.float32
EVEN = Rates(gram=1e11, tile=1e11, sample=1e11, sum=1e11, write=1e10, read=1e10, call=1e-5, passes=2)


@pytest.fixture(autouse=True)
def even_rates(monkeypatch):
    monkeypatch.setattr(planner, "rates_of", lambda *_: EVEN)


def shape(batch=8, T=64, d=32, p=16, sides=0, **kw) -> Shape:
    return Shape(batch, 1, T, d, p, F32, CPU, sides, **kw)


def test_the_fastest_way_is_first():
    few, many = shape(T=2, d=1024, p=1024), shape(T=2048, d=8, p=8)
    assert [plan.seconds for plan in choices(few)] == sorted(plan.seconds for plan in choices(few))
    assert choices(few)[0].way == "ghost" and choices(many)[0].way == "instantiate"


def test_one_position_is_a_product_of_norms():
    assert [plan.way for plan in choices(shape(T=1))] == ["product"]
    assert "product" not in {plan.way for plan in choices(shape(T=1, patches=True))}


def test_no_norm_gemm_where_there_is_no_op_for_it():
    without = Rates(**{**vars(EVEN), "tile": None})
    assert predicted(shape(), "norm-GEMM", without) is None
    assert predicted(shape(), "norm-GEMM", EVEN) is not None


def test_what_is_written_out_counts_less_what_it_replaces():
    written = 4 * 8 * 32 * 16
    assert predicted(shape(sides=100), "instantiate", EVEN).kept == written - 100
    assert predicted(shape(sides=10 * written), "instantiate", EVEN).kept == 0


def test_the_budget_is_of_all_layers_of_a_pass_together():
    one = shape(T=2048, d=8, p=8)
    kept = predicted(one, "instantiate", EVEN).kept
    plans = Planner(memory_budget=2 * kept)
    for _ in range(3):  # the same in every pass
        plans.start_pass()
        assert [plans.choose(name, one).kept for name in "abc"] == [kept, kept, 0]
    assert Planner(memory_budget=0).choose("a", one).way != "instantiate"
    assert Planner(memory_budget=1.0).choose("a", one).way == "instantiate"  # all of the memory in use


def test_another_shape_is_planned_anew():
    plans = Planner()
    assert plans.choose("a", shape(T=2, d=1024, p=1024)).way == "ghost"
    assert plans.choose("a", shape(T=2048, d=8, p=8)).way == "instantiate"


def test_a_pin_holds_for_a_module_and_what_is_in_it():
    plans = Planner(memory_budget=0, pins={"block.1": "instantiate"})
    many = shape(T=2048, d=8, p=8)
    assert plans.choose("block.1", many).way == plans.choose("block.1.inner", many).way == "instantiate"
    assert plans.choose("block.10", many).way != "instantiate"


def test_the_longest_prefix_counts():
    plans = Planner(pins={"": "ghost", "enc": "instantiate", "enc.head": "ghost"})
    many = shape(T=2048, d=8, p=8)
    assert [plans.choose(name, many).way for name in ("x", "enc.a", "enc.head")] == ["ghost", "instantiate", "ghost"]


def test_a_pin_that_cannot_be_met(monkeypatch):
    monkeypatch.setattr(planner, "rates_of", lambda *_: Rates(**{**vars(EVEN), "tile": None}))
    with pytest.warns(UserWarning, match="no 'norm-GEMM' for layer 'a' on cpu"):
        assert Planner(pins={"a": "norm-GEMM"}).choose("a", shape()).way != "norm-GEMM"


def test_a_pin_is_above_what_a_checkpoint_says():
    one, other = Planner(pins={"a": "ghost"}), Planner(pins={"a": "instantiate"})
    one.choose("a", shape())
    other.load_state_dict(one.state_dict())
    assert other.choose("a", shape()).way == "instantiate"


@pytest.mark.parametrize("budget", [-1, -0.1, math.nan, math.inf, "1GB", True])
def test_bad_budgets(budget):
    with pytest.raises(ValueError, match="memory_budget="):
        Planner(budget)


def test_bad_pins():
    with pytest.raises(ValueError, match="'fast'}: use one of ghost, norm-GEMM, instantiate"):
        Planner(pins={"a": "fast"})
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"plan names \['head'\]"):
        make_private(model, plan={"head": "ghost"})
    with pytest.raises(ValueError, match="of the fused mode"):
        make_private(model, memory_budget=5, grad_sample_mode="hooks")
    assert not hasattr(model[0].weight, "summed_grad")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Linear(5, 6), nn.Linear(6, 40)

    def forward(self, x):
        return self.wide(torch.tanh(self.narrow(x))).sum((1, 2))


def sums_of(**options) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model, _, _ = make_private(Net().double(), **options)
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    model(x).mean().backward()
    return {name: p.summed_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("way", ["ghost", "instantiate"])
def test_every_way_gives_the_same_sums(way):
    plain, pinned = sums_of(), sums_of(plan={"narrow": way, "wide": way})
    for name, summed in plain.items():
        torch.testing.assert_close(pinned[name], summed, rtol=1e-10, atol=1e-12)


def test_a_checkpoint_carries_the_plan(tmp_path):
    """A run that goes on where rates or memory are others still makes the same choices."""
    many = shape(T=2048, d=8, p=8)
    one, other = Planner(), Planner(memory_budget=0)
    before = one.choose("a", many)
    other.load_state_dict(one.state_dict())
    assert other.choose("a", many) == before and before.way == "instantiate"

    torch.manual_seed(0)
    engine = engine_of()
    model, optimizer, _ = make_private(Net(), engine=engine)
    model(torch.randn(4, 7, 5)).mean().backward()
    engine.save_checkpoint(path=tmp_path / "c.pt", module=model, optimizer=optimizer)
    again = engine_of()
    fresh, optimizer, _ = make_private(Net(), engine=again)
    again.load_checkpoint(path=tmp_path / "c.pt", module=fresh, optimizer=optimizer)
    assert fresh.clipped_sum.planner.state_dict() == model.clipped_sum.planner.state_dict()


@pytest.mark.parametrize(
    "state",
    [None, {}, {"plans": 3}, {"plans": [("a", {}, "ghost")]}, {"plans": [("a", shape()._asdict(), "fast")]}]
    + [
        {"plans": [("a", shape()._asdict() | change, "ghost")]}
        for change in (dict(batch=-5), dict(T="x"), dict(dtype="F"))
    ],
)
def test_a_plan_that_is_none(state, tmp_path):
    """Refused before anything of the checkpoint is taken."""
    plans = Planner()
    with pytest.raises(ValueError, match="plan_state_dict"):
        plans.load_state_dict(state)
    assert plans.state_dict() == {"plans": []}

    engine = engine_of()
    model, optimizer, _ = make_private(Net(), engine=engine)
    engine.save_checkpoint(path=tmp_path / "c.pt", module=model, optimizer=optimizer)
    torch.save(torch.load(tmp_path / "c.pt", weights_only=False) | {"plan_state_dict": state}, tmp_path / "c.pt")
    again = make_private(Net())
    weights = {name: p.clone() for name, p in again[0].named_parameters()}
    with pytest.raises(ValueError, match="plan_state_dict"):
        engine_of().load_checkpoint(path=tmp_path / "c.pt", module=again[0], optimizer=again[1])
    assert all(torch.equal(p, weights[name]) for name, p in again[0].named_parameters())


def without_reason(found: Rates) -> Rates:
    assert found.unmeasured is not None and "built-in rates" in found.unmeasured
    return replace(found, unmeasured=None)


class TestUnmeasured:
    """Predicted rates serve GPUs where none were measured, say so, and lead to plans."""

    CUDA = torch.device("cuda", 0)

    @pytest.fixture(autouse=True)
    def triton(self, monkeypatch):
        monkeypatch.setattr(unmeasured.ops, "why_no_triton", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def test_without_a_gpu_they_are_predicted(self):
        found = rates.rates_of(self.CUDA, torch.bfloat16, False)
        assert replace(found, unmeasured=None) == unmeasured.CUDA["linear", 16]
        assert "predicted from the kernels' machine code" in found.unmeasured and "no CUDA device" in found.unmeasured
        of_patches = rates.rates_of(self.CUDA, F32, True)
        assert replace(of_patches, unmeasured=None) == unmeasured.CUDA["convolution", 32]

    def test_while_a_graph_is_captured(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert "captured" in rates.rates_of(self.CUDA, torch.float16, False).unmeasured

    def test_measured_ones_come_first(self, monkeypatch, tmp_path):
        monkeypatch.setenv("DPFAST_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(rates, "measured", lambda *_: EVEN)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(rates, "_key", lambda device: "some-gpu")
        rates._rates.cache_clear()
        assert rates.rates_of(self.CUDA, torch.bfloat16, False) == EVEN
        rates._rates.cache_clear()

    @pytest.mark.parametrize("dtype, reason", [(torch.float64, None), (torch.bfloat16, "not installed")])
    def test_no_tiles_without_their_kernel(self, dtype, reason, monkeypatch):
        monkeypatch.setattr(unmeasured.ops, "why_no_triton", lambda: reason)
        assert rates.rates_of(self.CUDA, dtype, False).tile is None

    def test_plans_say_so_and_find_the_mix(self, monkeypatch):
        """Short sequences take ghost norms; long ones do not pay their T² (GPT-2 medium's own sizes)."""
        monkeypatch.setattr(planner, "rates_of", rates.rates_of)
        wide = [Shape(16, 1, T, 1024, 4096, torch.bfloat16, self.CUDA, 2 * 16 * T * 5120) for T in (64, 4096)]
        short, long = (choices(one) for one in wide)
        assert short[0].way == "ghost" and long[0].way != "ghost"
        assert all("predicted" in plan.unmeasured for plan in short + long)
        assert all("predicted" in plan.unmeasured for plan in self.others())
        monkeypatch.setattr(planner, "rates_of", lambda *_: EVEN)
        assert all(plan.unmeasured is None for plan in [*choices(wide[0]), *self.others()])

    def others(self):
        return planner.segments(4, 8, 16, 4, self.CUDA), planner.small(4, 16, 4, self.CUDA)


class TestClock:
    def test_a_gpu_waits_before_it_is_timed(self, monkeypatch):
        """The host is ahead when the first event comes: many small operators do not count what Python takes."""
        said = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                said.append("record")

            def elapsed_time(self, end):
                return 4.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append(("sleep", cycles)))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("wait"))
        assert rates.seconds(lambda: said.append("call"), torch.device("cuda", 0), times=1) == 4e-3
        assert said == ["call", ("sleep", clock.LEAD), "record", "call", "record", "wait"]

    def test_a_cpu_does_not(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "_sleep", lambda _: pytest.fail("there is nothing to wait for"))
        assert 0 < rates.seconds(lambda: sum(range(1000)), CPU, times=2) < 1


class TestRates:
    """Measured once, kept on disk; where that cannot be, the built-in ones."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DPFAST_CACHE_DIR", str(tmp_path / "cache"))
        rates._rates.cache_clear()
        yield
        rates._rates.cache_clear()

    def test_measured_once(self, tmp_path, monkeypatch):
        calls = []
        monkeypatch.setattr(rates, "measured", lambda *of: calls.append(of) or EVEN)
        assert rates.rates_of(CPU, F32, False) == EVEN
        rates._rates.cache_clear()
        assert rates.rates_of(CPU, F32, False) == EVEN
        assert len(calls) == 1
        (file,) = (tmp_path / "cache").iterdir()
        assert json.loads(file.read_text())["gram"] == EVEN.gram
        rates.rates_of(CPU, torch.float64, False)
        assert len(calls) == 2

    def test_of_this_machine(self):
        for patches in (False, True):
            found = rates.measured(CPU, F32, patches)
            assert all(0 < value < 1e16 for value in vars(found).values() if value is not None)

    def test_too_little_memory_to_measure(self, monkeypatch):
        def measured(*_):
            raise torch.OutOfMemoryError("all of it is taken")

        monkeypatch.setattr(rates, "measured", measured)
        assert without_reason(rates.rates_of(CPU, F32, False)) == unmeasured.CPU

    def test_a_device_that_nothing_is_known_of(self):
        assert rates.rates_of(torch.device("meta"), F32, False).tile is None

    def test_measuring_leaves_the_generator_alone(self):
        before = torch.get_rng_state()
        rates.measured(CPU, F32, False)
        assert torch.equal(before, torch.get_rng_state())

    def test_a_folder_that_cannot_be_written(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("DPFAST_CACHE_DIR", str(tmp_path / "file"))
        monkeypatch.setattr(rates, "measured", lambda *_: pytest.fail("measured for nothing"))
        assert without_reason(rates.rates_of(CPU, F32, False)) == unmeasured.CPU

    @pytest.mark.parametrize(
        "text",
        ["{}", "no json", json.dumps(vars(EVEN) | {"gram": 0}), "NaN", json.dumps(vars(EVEN) | {"unmeasured": "x"})],
    )
    def test_a_file_that_is_no_rates(self, text, tmp_path, monkeypatch):
        monkeypatch.setattr(rates, "measured", lambda *_: EVEN)
        rates.rates_of(CPU, F32, False)
        (file,) = (tmp_path / "cache").iterdir()
        file.write_text(text)
        rates._rates.cache_clear()
        assert without_reason(rates.rates_of(CPU, F32, False)) == unmeasured.CPU

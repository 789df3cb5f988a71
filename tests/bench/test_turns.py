"""Loops in which methods take turns: who has room beside whom, and who fails there."""

import copy
import itertools
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")
pytest.importorskip("tqdm", reason="the bench needs the extra 'demo'")

from bench import measure, side_by_side, turns
from bench.methods import quiet_peers, start_training
from bench.workloads import workloads

CPU = torch.device("cpu")
WORK = workloads("cpu", small=True)["mlp"]


@pytest.fixture(autouse=True)
def _all_in_every_round(monkeypatch):
    monkeypatch.setattr(measure, "SLOW", float("inf"))
    quiet_peers()


def entry(method, peak=0, kept=0, variant="plain"):
    memory = {"before_bytes": 1, "growth_bytes": peak - 1, "kept_bytes": kept}
    return {"method": method, "variant": variant, "error": None, "verdicts": [], "memory": memory}


def test_all_in_one_loop_where_there_is_room():
    entries = [entry("nonprivate", 10, 4), entry("dpfast", 11, 4), entry("hooks", 30, 4)]
    assert turns.loops_of(entries, 8 + 30) == [["nonprivate plain", "dpfast plain", "hooks plain"]]


@pytest.mark.parametrize("room", [1, 20, 37])
def test_the_base_is_in_every_loop_and_each_loop_has_room(room):
    entries = [entry("nonprivate", 10, 4), entry("dpfast", 11, 4), entry("hooks", 30, 4), entry("ghost", 12, 4)]
    loops = turns.loops_of(entries, room)
    assert all(loop[0] == "nonprivate plain" for loop in loops)
    others = [key for loop in loops for key in loop[1:]]
    assert sorted(others) == ["dpfast plain", "ghost plain", "hooks plain"]
    by_key = {turns.key_of(one): one for one in entries}
    for loop in loops:
        assert len(loop) == 2 or turns._taken([by_key[key] for key in loop]) <= room
    assert len(loops) == {1: 3, 20: 2, 37: 2}[room]


def test_alone_it_is_a_loop_too():
    assert turns.loops_of([entry("nonprivate")], 0) == [["nonprivate plain"]]


def test_several_loops_keep_their_own_rounds(monkeypatch):
    """Each figure is over the non-private rounds of its own loop."""
    monkeypatch.setattr(turns, "loops_of", lambda entries, room: [[BASE, "dpfast plain"], [BASE, "hooks plain"]])
    BASE = "nonprivate plain"
    part = {"entries": [entry(name) for name in ("nonprivate", "dpfast", "hooks")], "batch_size": 4, "tokens": 0}
    part["targets"] = {}
    turns.time_in_turns(part, WORK, CPU, 0.05, lambda: None)
    base, dpfast, hooks = ({int(n) for n in one["seconds"]} for one in part["entries"])
    assert dpfast and hooks and dpfast.isdisjoint(hooks) and base == dpfast | hooks
    rows = {row["method"]: row for row in side_by_side.summary(part, {})}
    assert rows["dpfast"]["time_ratio"]["n"] == len(dpfast) and rows["nonprivate"]["time_ratio"]["median"] == 1


@pytest.mark.parametrize("loop", [0, 1])
def test_without_its_base_there_is_no_figure(loop, monkeypatch):
    """Memory that only one loop lacks costs the figures of that loop alone."""
    base, here = "nonprivate plain", []
    monkeypatch.setattr(turns, "loops_of", lambda entries, room: [[base, "dpfast plain"], [base, "hooks plain"]])
    start = turns.start_training

    def full():
        raise torch.OutOfMemoryError("tried 80 GiB")

    def no_room(work, method, variant, device, plan):
        here.append(method)
        if method == "nonprivate" and here.count("nonprivate") == loop + 1:
            return lambda: full
        return start(work, method, variant, device, plan=plan)

    monkeypatch.setattr(turns, "start_training", no_room)
    part = {"entries": [entry(name) for name in ("nonprivate", "dpfast", "hooks")], "batch_size": 4, "tokens": 0}
    part |= {"targets": {}, "flops": {"plain": 1}}
    turns.time_in_turns(part, WORK, CPU, 0.05, lambda: None)
    rows = {row["method"]: row for row in side_by_side.summary(part, {"flops_per_second": 1e9})}
    left, right = (("hooks", "dpfast"), ("dpfast", "hooks"))[loop]
    assert rows["nonprivate"]["error"] is None and rows["nonprivate"]["step_seconds"]["n"] >= measure.MIN_ROUNDS
    assert rows[left]["time_ratio"]["n"] >= measure.MIN_ROUNDS and "time_ratio" not in rows[right]
    assert rows[right]["error"] == "no non-private step beside it: out of memory: tried 80 GiB"


def test_a_base_that_fails_everywhere_says_so(monkeypatch):
    def full():
        raise torch.OutOfMemoryError("tried 80 GiB")

    monkeypatch.setattr(turns, "start_training", lambda *_, plan: lambda: full)
    part = {"entries": [entry("nonprivate"), entry("dpfast")], "batch_size": 4, "tokens": 0}
    part |= {"targets": {}, "flops": {"plain": 1}}
    turns.time_in_turns(part, WORK, CPU, 0.05, lambda: None)
    rows = side_by_side.summary(part, {"flops_per_second": 1e9})
    assert ["out of memory" in row["error"] for row in rows] == [True, True]
    assert not any("step_seconds" in row for row in rows)


def test_the_plan_is_the_one_that_dpfast_makes_alone():
    """Beside others more memory is in use, of which the planner's budget is a part."""
    for way in ("ghost", "instantiate"):
        work = workloads("cpu", small=True)["gpt2"]
        part = {"entries": [entry("nonprivate"), entry("dpfast")], "batch_size": 4, "tokens": 8, "targets": {}}
        part["alone"] = {"plan": {"": way}}
        turns.time_in_turns(part, work, CPU, 0.05, lambda: None)
        assert side_by_side.summary(part, {})[1]["ways"] == [way]


def test_each_round_has_an_order_of_its_own():
    items = list("abcdef")
    orders = [measure.shuffled(items, number) for number in range(200)]
    assert orders == [measure.shuffled(items, number) for number in range(200)]
    pairs = {pair for order in orders for pair in itertools.pairwise(order)}
    assert len(pairs) == 30 and {order[0] for order in orders} == set(items)


def test_a_first_call_that_compiles_is_not_its_cost(monkeypatch):
    """It would be taken for a slow one, and timed in few rounds."""
    monkeypatch.setattr(measure, "SLOW", 100.0)
    first = [time.sleep]

    def compiled():
        first.pop()(0.5) if first else None

    taken = measure.in_turns({"base": lambda: time.sleep(0.002), "compiled": compiled}, CPU, 0.1)
    assert len(taken["compiled"]) == len(taken["base"])


def test_a_lost_device_ends_the_turns(monkeypatch):
    """Who lost it is named; the others are not blamed for what they cannot do any more."""
    gone = []
    monkeypatch.setattr(measure, "is_lost", lambda device: bool(gone))

    def lost(call, device):  # a GPU's error comes when the clock waits for it, not in the call
        if call is calls["b"]:
            gone.append("it")
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return measure.timed(call, device)

    calls = {"a": lambda: None, "b": lambda: None}
    taken, reasons = measure.turns_of(calls, CPU, 0.01, clock=lost)
    assert set(reasons) == {"b"} and "illegal memory access" in reasons["b"] and set(taken) == {"a"}


def test_a_failure_that_leaves_the_device_as_it_was_is_one_calls_own():
    def refused():
        raise torch.AcceleratorError("CUDA error: too many resources requested for launch")

    taken, reasons = measure.turns_of({"a": lambda: None, "b": refused}, CPU, 0.01)
    assert set(reasons) == {"b"} and len(taken["a"]) >= measure.MIN_ROUNDS


@pytest.mark.parametrize("when", ["set up", "timed"])
def test_on_a_lost_device_nobody_else_has_failed(when, monkeypatch):
    """A new process goes on with the others."""
    gone = []
    monkeypatch.setattr(measure, "is_lost", lambda device: bool(gone))
    start = turns.start_training

    def broken():
        gone.append("it")
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def started(work, method, *given, **more):
        if method == "nonprivate":
            return start(work, method, *given, **more)
        return broken if when == "set up" else lambda: lambda: broken()

    monkeypatch.setattr(turns, "start_training", started)
    part = {"entries": [entry("nonprivate"), entry("flashdp"), entry("hooks")]}
    part |= {"batch_size": 4, "tokens": 0, "targets": {}}
    turns.time_in_turns(part, WORK, CPU, 0.05, lambda: None)
    errors = {one["method"]: one["error"] for one in part["entries"]}
    assert errors["nonprivate"] is None and "illegal memory access" in errors["flashdp"] and errors["hooks"] is None


@pytest.mark.parametrize("model", [nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))])
def test_a_plan_can_be_given_back(model):
    """Also that of a model which is one layer: its name in a plan is no module's."""
    work = replace(WORK, build=lambda variant: copy.deepcopy(model), inputs=lambda n: torch.randn(n, 3, 8))
    work = replace(work, classes=4, tokens=3)
    step = start_training(work, "dpfast", "plain", CPU)()
    step()
    assert step.plan and set(step.plan.values()) <= {"ghost", "instantiate"}
    for way in ("ghost", "instantiate"):
        again = start_training(work, "dpfast", "plain", CPU, plan=dict.fromkeys(step.plan, way))()
        again()
        assert set(again.plan.values()) == {way}


def test_who_fails_is_let_go_and_the_others_go_on():
    held = [3]
    calls = {"a": lambda: None, "b": lambda: held.pop()}
    taken, reasons = measure.turns_of(calls, CPU, 0.01)
    assert list(calls) == ["a"] and reasons == {"b": "IndexError: pop from empty list"}
    assert sorted(taken["a"]) == list(range(len(taken["a"]))) and len(taken["a"]) >= measure.MIN_ROUNDS


@pytest.mark.parametrize(
    "times, calls",
    [
        ([1e-3] * 100, measure.MOST_WARM_UP),
        ([9.0, 4.0, *[1e-3] * 98], measure.MOST_WARM_UP),  # compiles twice, and has its time all the same
        ([0.6] * 100, 2),
        ([9.0, 0.4, *[0.3] * 98], 4),
    ],
    ids=["short", "compiled", "long", "compiled and long"],
)
def test_a_warm_up_does_not_count_what_compiles(monkeypatch, times, calls):
    left = iter(times)
    monkeypatch.setattr(measure, "timed", lambda call, device: next(left))
    assert measure._warmed_up(lambda: None, torch.device("cpu")) == min(times[:calls])
    assert len(list(left)) == len(times) - calls

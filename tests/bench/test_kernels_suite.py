"""The kernels' suite, as far as a CPU goes: its record is whole, what is wrong has no figure, nothing is lost."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")
pytest.importorskip("tqdm", reason="the bench needs the extra 'demo'")
pytest.importorskip("matplotlib", reason="the bench needs the extra 'demo'")

from bench import measure, roofline
from bench.record import Record
from bench.suites import Options, kernel_cases, kernels, memory_cases, noise_cases, planner_cases
from bench.suites.kernel_cases import SMALL, Case, CaseSet
from dpfast import ops
from dpfast.capture.forms import Factored
from dpfast.planning import planner
from dpfast.planning.unmeasured import CPU as RATES

CPU = torch.device("cpu")
OPTIONS = Options(CPU, seconds=0.01, small=True)
ROOF = {"bytes_per_second": 1e10, "flops_per_second": 1e11}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small peaks in few rounds; nothing is measured for the planner, and nothing written for later runs."""
    monkeypatch.setattr(planner, "rates_of", lambda device, *_: RATES)
    for name, value in (("COPIED", 1 << 16), ("SIDE", 16), ("SECONDS", 0.001)):
        monkeypatch.setattr(roofline, name, {"cpu": value})


def new_record(folder):
    return Record.new(folder, "kernels", CPU, {"command": "test"})


def on_disk(record):
    return json.loads(record.path.read_text())


def one_and(call, base=torch.clone, title="8"):
    """A copy, and a case of ours that must be a copy too."""
    x = torch.ones(8)
    check = lambda: kernel_cases.relative_error([call(x)], [x])  # noqa: E731
    cases = [Case("copy", 0, 64, lambda: base(x)), Case("ours", 8, 64, lambda: call(x), check, 0.8)]
    return CaseSet(title, "bytes", torch.float32, lambda: cases)


def raises(error=RuntimeError, text="out of registers"):
    raise error(text)


# ---------------------------------------------------------------- a whole run


def test_the_record_is_whole(tmp_path):
    record = new_record(tmp_path)
    assert kernels.run(record, OPTIONS)
    data = on_disk(record)
    suite = data["suite"]
    assert set(suite["sets"]) == {one.title for one in kernels.case_sets(SMALL, CPU)}
    assert set(suite["planner"]) == {planner_cases.title(shape) for shape in SMALL.plans}
    roof = suite["roofline"]["float32"]
    assert roof["passes"].keys() == {"copy", "read only", "in place"} and roof["flops_per_second"] > 0
    assert roof["bytes_per_second"] == max(roof["passes"].values())
    for rows in suite["sets"].values():
        assert len(rows) >= 2 and not rows[0]["ours"] and any(row["ours"] for row in rows)
        for row in rows:
            assert row["milliseconds"]["n"] >= measure.SLOW_ROUNDS and row["met"] is None
            for name in ("milliseconds", "bytes_per_second", "share", "ratio", "roofline"):
                assert 0 < row[name]["p20"] <= row[name]["median"] <= row[name]["p80"]
            assert row["intensity"] == row["flops"] / row["bytes"]
    for rows in suite["planner"].values():
        assert sum(row["chosen"] for row in rows) == sum(row["fastest"] for row in rows) == 1
        assert all(row["predicted_seconds"] > 0 and row["over_fastest"] >= 1 for row in rows)
    printed = kernels.report(data)
    assert "predicted / measured" in printed and f"of {len(SMALL.plans)} weights" in printed
    assert all(f"**{title}**" in printed for title in suite["sets"])
    (path,) = kernels.draw(data, tmp_path / "a")
    assert path.name == "a-roofline.png" and path.stat().st_size > 10_000


@pytest.mark.parametrize(
    "passes, words",
    [
        ({}, "a copy 10 GB/s"),  # an old record
        ({"passes": {"copy": 1e10, "read only": 9e9}}, "a copy 10 GB/s"),
        ({"passes": {"copy": 8e9, "read only": 9e9, "in place": 1e10}}, "a copy 8 GB/s (in place 10 GB/s)"),
    ],
)
def test_a_roof_in_words(passes, words):
    roof = ROOF | passes | {"dtype": "float32"}
    assert roofline.in_words(roof) == f"{words}, a float32 matrix product 100 GFLOP/s"


def test_all_ops_have_a_case():
    names = " ".join(case.name for one in kernels.case_sets(SMALL, CPU) for case in one.make())
    for op in ("weighted_sums", "squared_norms", "sum_positions", "normalised_sums", "channel_sums", "embedding_sum"):
        assert not ops.is_native(op, CPU) or f"{op} (native)" in names
    assert "ghost norm" in names and "clipped weight gradient" in names and "convolution_grad_samples" in names
    assert "noisy_grad_ fast" in names and "noisy_grad_ secure" in names
    assert not ops.is_native("noisy_adam_", CPU) or "noisy_adam_ (AdamW) fast, bfloat16" in names


def test_tritons_kernels_pass_too(monkeypatch):
    """In the interpreter where there is no GPU."""
    if reason := ops.why_no_triton():
        pytest.skip(f"no Triton: {reason}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(ops, "TRITON_DEVICES", {device.type})
    cases = [case for case in memory_cases.memory_cases(SMALL, device) if "Triton" in case.name]
    assert len(cases) == 7 and all(case.check() <= case.tolerance for case in cases)


def test_no_call_finds_its_buffers_in_the_cache():
    """Those of its neighbours are others, and what is used before they come again is larger than the cache."""
    cases = [case for case in memory_cases.memory_cases(SMALL, CPU) if "native" in case.name]
    last = set()
    for case in cases * 3:
        arguments = case.call.func(lambda *given: given, *case.call.args[1:])
        used = {id(one) for one in torch.utils._pytree.tree_leaves(arguments)} - shared(case)
        assert used and not used & last
        last = used
    B, T, d, _ = kernel_cases.SIZES["cpu"].memory
    for nbytes in (2 * B * T * d, 4 * kernel_cases.SIZES["cpu"].elements):
        assert nbytes * kernel_cases.sets_of(nbytes) >= kernel_cases.BEYOND_CACHE


def shared(case):
    """What every call gets: factors and ids."""
    return set.intersection(*({id(one) for one in torch.utils._pytree.tree_leaves(a)} for a in case.call.args[1]))


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    """What was finished is on the disk, and nothing is measured twice."""
    measured = []

    def stop(x):
        measured.append("second")
        raise KeyboardInterrupt

    def count(name):
        def call(x):
            measured.append(name)
            return x.clone()

        return call

    sets = [
        one_and(count("first"), title="first"),
        one_and(stop, title="second"),
        one_and(count("third"), title="third"),
    ]
    monkeypatch.setattr(kernels, "case_sets", lambda *_: sets)
    monkeypatch.setattr(kernels, "SMALL", replace(SMALL, plans=SMALL.plans[:1]))
    record = new_record(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        kernels.run(record, OPTIONS)
    before = on_disk(record)["suite"]
    assert set(before["sets"]) == {"first"} and "float32" in before["roofline"] and not before["planner"]
    measured.clear()
    sets[1] = one_and(count("second"), title="second")
    again = Record(record.path, on_disk(record))
    assert kernels.run(again, OPTIONS)
    after = on_disk(again)["suite"]
    assert set(measured) == {"second", "third"}
    assert list(after["sets"]) == ["first", "second", "third"] and len(after["planner"]) == 1
    assert after["sets"]["first"] == before["sets"]["first"] and after["roofline"] == before["roofline"]
    measured.clear()
    assert kernels.run(again, OPTIONS) and not measured


@pytest.mark.parametrize(
    "ours, theirs, right", [(torch.clone, lambda x: raises(), True), (torch.neg, torch.clone, False)]
)
def test_a_run_is_as_right_as_ours_are(ours, theirs, right, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "case_sets", lambda *_: [one_and(ours, theirs)])
    monkeypatch.setattr(kernels, "SMALL", replace(SMALL, plans=()))
    record = new_record(tmp_path)
    assert kernels.run(record, OPTIONS) is right
    assert sum("error" in row for row in record.suite["sets"]["8"]) == 1
    assert ("out of registers" if right else "wrong: relative error") in kernels.report(record.data)


# ---------------------------------------------------------------- what gets no figure


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda x: 1.01 * x, "wrong: relative error 1.0e-02"),
        (lambda x: torch.nan * x, "wrong: relative error nan"),
        (lambda x: raises(), "RuntimeError: out of registers"),
        (lambda x: raises(torch.OutOfMemoryError, "tried 80 GiB"), "out of memory: tried 80 GiB"),
    ],
)
def test_what_is_wrong_gets_no_figure(call, text):
    copy, bad = kernels.measured(one_and(call), CPU, 0.01, {"float32": ROOF})
    assert bad == {"name": "ours", "ours": True, "error": text}
    assert copy["name"] == "copy" and copy["share"]["median"] == 1
    assert text in kernels._table([copy, bad])


def test_what_is_right_gets_one():
    ours = kernels.measured(one_and(torch.clone), CPU, 0.01, {"float32": ROOF})[1]
    assert ours["over"] == "copy" and ours["share"]["median"] > 0 and ours["intensity"] == 1 / 8


@pytest.mark.parametrize("flops, bytes_, least", [(8, 64, 64 / 1e10), (8000, 64, 8000 / 1e11), (0, 64, 64 / 1e10)])
def test_figures_of_known_times(flops, bytes_, least):
    """Bound by bytes, by flops, and by bytes without any flops; ours takes twice the time for half of the bytes."""
    one, (base, ours) = one_and(torch.clone), (Case("copy", 0, 128, list), Case("ours", flops, bytes_, list))
    taken = {"copy": {0: 1.0, 1: 2.0, 2: 4.0}, "ours": {0: 2.0, 2: 8.0}}
    found = kernels.figures(one, ours, base, taken, CPU, ROOF)
    assert found["milliseconds"]["median"] == 5000 and found["milliseconds"]["n"] == 2
    assert found["ratio"]["median"] == 2 and found["share"]["median"] == 0.25
    assert found["roofline"]["median"] == pytest.approx((least / 2 + least / 8) / 2)
    assert found["flops_per_second"]["median"] == pytest.approx((flops / 2 + flops / 8) / 2)


def test_without_the_first_one_there_is_no_share():
    copy, ours = kernels.measured(one_and(torch.clone, lambda x: raises()), CPU, 0.01, {"float32": ROOF})
    assert copy["error"] and "share" not in ours and ours["roofline"]["median"] > 0
    assert "out of registers" in kernels._table([copy, ours])


def test_a_set_that_cannot_be_made_is_a_row():
    (row,) = kernels.measured(CaseSet("8", "bytes", torch.float32, raises), CPU, 0.01, {})
    assert row["error"] == "RuntimeError: out of registers" and row["ours"]


def test_who_finds_no_memory_beside_the_others_is_left_out():
    left = [None] * 4

    def later(x):
        left.pop() if left else raises(torch.OutOfMemoryError, "tried 80 GiB")
        return x

    copy, ours = kernels.measured(one_and(later), CPU, 0.01, {})
    assert ours["error"] == "out of memory: tried 80 GiB" and copy["milliseconds"]["n"] >= measure.MIN_ROUNDS


def test_a_failure_of_nobody_is_everybodys(monkeypatch):
    monkeypatch.setattr(measure, "in_turns", lambda *_: raises())
    taken, reasons = measure.turns_of({"a": list, "b": list}, CPU, 0.01)
    assert not taken and set(reasons) == {"a", "b"}


@pytest.mark.parametrize("share, word", [(0.9, "met"), (0.1, "NOT met")])
def test_a_target_is_said_to_be_met_or_not(share, word):
    row = kernels.measured(one_and(torch.clone), CPU, 0.01, {"float32": ROOF})[1]
    row |= {"target": 0.8, "met": share >= 0.8, "share": measure.percentiles([share])}
    assert kernels._cells(row)[-1] == f"≥ 80%: {word}"


# ---------------------------------------------------------------- the checks can fail


def errors(cases):
    return {case.name: (case.check(), case.tolerance) for case in cases if case.check}


@pytest.mark.parametrize("n", [1 << 14, 50_001])
def test_noise_is_compared(n, monkeypatch):
    cases = noise_cases.noise_cases(n, CPU)
    assert all(error <= limit for error, limit in errors(cases).values())
    right = noise_cases.noisy

    def other_noise(summed, grads, noise):
        right(summed, grads, replace(noise, step=noise.step + 1))

    def none_at_the_end(summed, grads, noise):
        right(summed, grads, noise)
        grads[-1][-1] = 0

    for wrong in (other_noise, none_at_the_end):
        monkeypatch.setattr(noise_cases, "noisy", wrong)
        found = errors(cases)
        still = {name for name, (error, limit) in found.items() if error <= limit}
        assert still <= ({"noisy_grad_ without noise"} if wrong is other_noise else set())


@pytest.mark.skipif(not ops.is_native("noisy_adam_", CPU), reason="updates are compiled, and there is no library")
@pytest.mark.parametrize("name, value", [("BETAS", (0.9, 0.99)), ("DECAY", 0.5), ("MOMENT", 0.8), ("T", 5)])
def test_updates_are_compared(name, value, monkeypatch):
    cases = noise_cases.update_cases(5000, CPU)
    assert all(error <= limit for error, limit in errors(cases).values())
    step = noise_cases.step_in_float64

    def otherwise(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(noise_cases, name, value)
            return step(*arguments)

    monkeypatch.setattr(noise_cases, "step_in_float64", otherwise)
    wrong = {case for case, (error, limit) in errors(cases).items() if error > limit}
    rule = {"BETAS": "adam", "T": "adam", "MOMENT": "sgd", "DECAY": ""}[name]
    assert wrong == {case for case in errors(cases) if rule in case}


WRONG = 1.01  # what a middle sample is multiplied by: among all samples' numbers it would not be seen


def spoilt(out):
    """A tensor, or several, with a middle sample that is a little wrong."""
    if not isinstance(out, torch.Tensor):
        return type(out)(map(spoilt, out))
    out = out.clone()
    out[len(out) // 2] *= WRONG
    return out


def test_ghost_norms_of_all_samples_are_compared(monkeypatch):
    right = ops.ghost_squared_norm
    cases = kernel_cases.ghost_cases(16, 16, 24, SMALL, CPU)
    ((_, limit),) = errors(cases).values()
    assert errors(cases)["ghost norm"][0] <= limit
    monkeypatch.setattr(ops, "ghost_squared_norm", lambda A, G: spoilt(right(A, G)))
    assert errors(cases)["ghost norm"][0] > limit


def test_every_sample_and_every_output_is_compared():
    B = 256
    cases = [case for case in memory_cases.memory_cases(replace(SMALL, memory=(B, 8, 16, 50)), CPU) if case.check]
    if not cases:
        pytest.skip("no compiled library")
    for case in cases:
        op, one, _ = case.check.args
        assert with_outputs(case, lambda out: out) is None
        if isinstance(op(*one.arguments[0]), tuple | list):
            assert "ValueError" in with_outputs(case, lambda out: out[:-1])
            assert "ValueError" in with_outputs(case, lambda out: [*out, out[0]])
        if one.by_sample:
            of_samples = spoilt if "squared_norms" not in case.name else lambda out: spoilt(out[0])[None]
            assert with_outputs(case, of_samples).startswith("wrong: relative error"), case.name


def with_outputs(case, change):
    """Why a case would get no figure if its op's outputs were changed."""
    op, one, outputs = case.check.args
    return kernel_cases.wrong(lambda: case.check.func(lambda *given: change(op(*given)), one, outputs))


@pytest.mark.parametrize("method", ["squared_norm", "clipped_sum"])
def test_a_way_that_is_wrong_gets_no_figure(method, monkeypatch):
    right = getattr(Factored, method)
    monkeypatch.setattr(Factored, method, lambda *given: spoilt(right(*given)))
    rows = {row["way"]: row for row in planner_cases.planned((256, 16, 16, 16), torch.float32, CPU, 0.01)}
    assert rows["ghost"]["error"].startswith("wrong: relative error") and rows["ghost"]["ours"]
    assert "seconds" not in rows["ghost"] and rows["instantiate"]["fastest"] and "error" not in rows["instantiate"]


@pytest.mark.parametrize("shape, way", [((4, 4, 64, 64), "ghost"), ((4, 64, 64, 64), "instantiate")])
def test_the_way_is_the_one_of_the_default_budget(shape, way, monkeypatch):
    """It is what most of a model's weights get."""
    monkeypatch.setattr(planner, "rates_of", lambda *_: replace(RATES, gram=1e7))
    rows = planner_cases.planned(shape, torch.float32, CPU, 0.01)
    assert [row["way"] for row in rows] == ["instantiate", "ghost"] and rows[0]["fastest_predicted"]
    assert [row["way"] for row in rows if row["chosen"]] == [way]
    over = "For 1 the budget left no room for the way that was predicted to be the fastest."
    assert (over in planner_cases.report(rows)) is (way == "ghost")
    B, T, d, p = shape
    form = Factored(torch.ones(B, 1, T, d), torch.ones(B, 1, T, p), rows=p)
    layers = 24
    monkeypatch.setattr(planner, "in_use", lambda device: layers * planner_cases.in_use(form.shape))
    model = planner.Planner()
    ways = Counter(model.choose(f"layer {k}", form.shape).way for k in range(layers))
    assert ways.most_common(1)[0][0] == way

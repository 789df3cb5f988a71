"""What the models and layers suites print and draw of a record: whole, interrupted, with failures in it."""

import json

import pytest

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")
pytest.importorskip("tqdm", reason="the bench needs the extra 'demo'")
pytest.importorskip("matplotlib", reason="the bench needs the extra 'demo'")

import torch

from bench import plots
from bench.record import Record
from bench.suites import Options, layers, models
from bench.workloads import workloads

ROOF = {"bytes_per_second": 1e10, "flops_per_second": 1e11, "dtype": "float32"}
SPREAD = {"median": 1.5, "p20": 1.25, "p80": 1.75, "n": 5}


def row(method="dpfast", error=None, timed=True, **more):
    """As a summary makes it."""
    found = {"method": method, "variant": "plain", "verdicts": [{"variant": "plain", "error": 1e-6, "reason": error}]}
    if timed and error is None:
        seconds = {name: 0.01 * value for name, value in SPREAD.items()}
        found |= {"step_seconds": seconds, "time_ratio": SPREAD, "samples_per_second": 321.0, "of_roofline": 0.5}
    return found | {"error": error} | more


def part(*rows, title="a model", **more):
    return {"title": title, "batch_size": 4, "tokens": 0, "targets": {}, "rows": list(rows), "finished": True} | more


def entry(method, seconds=(), **more):
    """As it is in a record before there are rows."""
    timed = {"seconds": {str(number): taken for number, taken in enumerate(seconds)}} if seconds else {}
    return {"method": method, "variant": "plain", "verdicts": [], "error": None} | timed | more


def stopped(*entries, title="a model"):
    return {
        "title": title,
        "batch_size": 4,
        "tokens": 0,
        "targets": {},
        "flops": {"plain": 1000},
        "entries": [*entries],
    }


def record(suite, finished=True, device="cpu"):
    machine = {
        "cpu": "a CPU",
        "threads": 2,
        "versions": {"torch": "2", "opacus": None},
        "python": "3",
        "commit": "c0ffee",
    }
    machine |= {"uncommitted_changes": False, "date": "2026-11-22T00:00:00", "load_before": 0.1}
    made = {"machine": machine, "device": {"name": device}, "configuration": {"command": "python -m dpfast bench"}}
    data = made | {"finished": finished, "suite": {"peaks": ROOF} | suite}
    return json.loads(json.dumps(data))


def sweep(**points):
    named = {f"T {value[1:]}": each for value, each in points.items()}
    return {"sweeps": {"T": {"title": "linear layer, B 2", "points": named}}}


@pytest.fixture
def drawn(monkeypatch):
    """All the texts of the figure that was written last."""
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    yield lambda: [text.get_text() for text in figures[-1].findobj(plots.plt.Text) if text.get_text()]
    monkeypatch.undo()
    for figure in figures:
        plots.plt.close(figure)


def line_of(text, start):
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return line


# ---------------------------------------------------------------- interrupted


TIMED = (
    entry("nonprivate", (1.0, 2.0), memory={"growth_bytes": 1 << 20}),
    entry("dpfast", (1.25, 2.5), memory={"growth_bytes": 3 << 19}),
    entry("hooks"),
)


@pytest.mark.parametrize("suite, kind", [(models, "works"), (layers, "kinds")])
def test_what_was_measured_before_a_stop_is_shown(suite, kind, tmp_path, drawn):
    data = record({kind: {"first": part(row("nonprivate"), row()), "second": stopped(*TIMED)}}, finished=False)
    text = suite.report(data)
    assert text.splitlines()[2].startswith("unfinished: ")
    assert "1.25 (1.25–1.25)" in text and "| 1.50 " in text
    (path,) = suite.draw(data, tmp_path / "record")
    assert path.stat().st_size > 0
    assert {"1.25", "1.50", "not measured", "Opacus hooks"} <= set(drawn())


@pytest.mark.parametrize("suite, kind", [(models, "works"), (layers, "kinds")])
@pytest.mark.parametrize("entries", [(), (entry("dpfast"),)])
def test_a_stop_before_any_figure(suite, kind, entries, tmp_path):
    data = record({kind: {"first": stopped(*entries)}}, finished=False)
    assert "a model" in suite.report(data)
    assert not suite.draw(data, tmp_path / "record") and not list(tmp_path.iterdir())
    text = suite.report(record({}, finished=False))
    assert "unfinished: " in text and "target" not in text


def test_a_stopped_sweep(tmp_path, drawn):
    suite = sweep(v64=part(row("nonprivate"), row(ways=["ghost"])), v128=stopped(*TIMED[:2]), v256=stopped())
    data = record(suite, finished=False)
    assert line_of(layers.report(data), "| 128 ").split("|")[2:4] == [
        " 1500.00 (1200.00–1800.00) ",
        " 1.25 (1.25–1.25)        ",
    ]
    assert len(layers.draw(data, tmp_path / "record")) == 1 and "ghost" in drawn()


def test_a_finished_record_is_not_called_unfinished():
    assert "unfinished" not in models.report(record({"works": {"first": part(row())}}))


# ---------------------------------------------------------------- the tables


def test_a_layer_has_every_figure_and_where_memory_is_measured():
    memory = {"memory": {"growth_bytes": 7 << 20}, "memory_ratio": 1.4}
    for device, said in (("cpu", True), ("NVIDIA H100", False)):
        text = layers.report(record({"kinds": {"linear": part(row("nonprivate"), row(**memory))}}, device=device))
        line = line_of(text, "| dpfast ")
        for figure in ("15.00 (12.50–17.50)", "1.50 (1.25–1.75), n=5", "321", "50%", "7", "1.40"):
            assert f" {figure} " in line
        assert ("Memory of single layers is measured on a GPU only" in text) is said
        assert "The loss, a cross-entropy" in text


def test_columns_without_a_figure_are_left_out():
    text = models.report(record({"works": {"first": part(row(tokens_per_second=5.0)), "second": part(row())}}))
    assert text.count("tokens/s") == 1 and "largest batch" not in text


@pytest.mark.parametrize(
    "error, word",
    [
        ("wrong: relative error 1.0e-02 in bias", "wrong"),
        ("beside the others: out of memory: tried 80 GiB", "out of memory"),
        ("not checked: the oracle has no answer", "not checked"),
        ("ValueError: something wrong", "no figure"),
    ],
)
def test_without_a_figure_there_is_a_word_and_the_reason(error, word, tmp_path, drawn):
    rows = row("nonprivate"), row("hooks", error, ways=["ghost"]), row()
    for suite, kind in ((models, "works"), (layers, "kinds")):
        data = record({kind: {"first": part(*rows)}})
        text = suite.report(data)
        assert line_of(text, "| Opacus hooks ").split("|")[2].strip() == word and f"- Opacus hooks: {error}" in text
        suite.draw(data, tmp_path / "record")
        assert {"Opacus hooks", word, "1.50"} <= set(drawn())
    data = record(sweep(v64=part(*rows)))
    text = layers.report(data)
    assert word in line_of(text, "| 64 ") and f"- T 64: Opacus hooks: {error}" in text
    layers.draw(data, tmp_path / "record")
    assert f"Opacus hooks, {word} at T 64" in drawn()


def test_a_plot_where_nobody_has_a_figure(tmp_path, drawn):
    models.draw(
        record({"works": {"first": part(row("nonprivate", "out of memory: x"), row(error="wrong: x"))}}), tmp_path
    )
    assert {"dpfast", "wrong"} <= set(drawn())


@pytest.mark.parametrize(
    "found, text",
    [
        ({"fits": 1792, "fails": 1920}, "1792 (not 1920)"),
        ({"fits": 65536, "fails": None}, "≥ 65536"),
        ({"fits": 0, "fails": 1}, "0 (not 1)"),
        ({"fits": 4, "fails": 8, "error": "RuntimeError: no"}, "4 (not 8: RuntimeError: no)"),
        (768, "768"),
    ],
)
@pytest.mark.parametrize("limit, where", [(64 << 20, "in 64 MiB of growth"), (None, "in the GPU's memory")])
def test_the_largest_batch_and_how_exact_it_is(found, text, limit, where):
    its = part(row(largest_batch=found), memory_limit_bytes=limit)
    report = models.report(record({"works": {"first": its}}))
    assert f" {text} " in line_of(report, "| dpfast ")
    assert line_of(report, "- largest batch").startswith(f"- largest batch {where}")


def test_targets_or_where_they_are():
    targets = {"time": {"at_most": 1.6, "reached": 1.5}, "memory": {"at_most": 1.1, "reached": 1.4}}
    its = part(row(targets=targets), targets={"time": 1.6, "memory": 1.1})
    text = models.report(record({"works": {"first": its}}))
    assert "time ≤ 1.6: 1.50, met" in text and "memory ≤ 1.1: 1.40, NOT met" in text and "--model" not in text
    for device, name in (("cpu", "cpu"), ("cuda", "NVIDIA H100")):
        text = models.report(record({"works": {"first": part(row())}}, device=name))
        have = [known for known, work in workloads(device).items() if work.targets]
        assert have and f"--device {device} --method nonprivate dpfast --model {' '.join(have)}" in text


def test_the_roof_is_the_products():
    text = models.report(record({"works": {"first": part(row())}}))
    assert "of the product's roof" in text and "attention's count in full, causal or not" in text
    text = models.report(record({"peaks": {"error": "RuntimeError: no"}, "works": {"first": part(row(of_roofline=0))}}))
    assert "RuntimeError: no" in text and "0%" not in text


# ---------------------------------------------------------------- the planner's ways


def test_ways_are_those_of_the_timed_run(tmp_path, drawn):
    data = record(
        sweep(
            v64=part(row("nonprivate"), row(ways=["ghost"]), way="other"),
            v128=part(row("nonprivate"), row(ways=["ghost"])),
            v256=part(row("nonprivate"), row(ways=["instantiate", "norm-GEMM"])),
            v512=part(row("nonprivate"), row(error="wrong: x", ways=["ghost"]), way="other"),
        )
    )
    text = layers.report(data)
    cells = [line_of(text, f"| {T} ").split("|")[3].strip() for T in (64, 256, 512)]
    assert cells == ["1.50 (1.25–1.75), ghost", "1.50 (1.25–1.75), instantiate, norm-GEMM", "wrong"]
    layers.draw(data, tmp_path / "record")
    texts = drawn()
    assert texts.count("ghost") == 1 and texts.count("instantiate, norm-GEMM") == 1 and "other" not in texts


def test_no_step_but_the_timed_ones(tmp_path, monkeypatch):
    """A dpfast that fails is a row; nothing else of it is run, now or when the run goes on."""

    def failed(part, work, *_):
        part |= stopped(entry("nonprivate", (1.0,)), entry("dpfast", error="RuntimeError: no")) | {"finished": True}

    monkeypatch.setattr(layers, "measure_work", failed)
    monkeypatch.setattr(layers, "peaks", lambda *_: ROOF)
    monkeypatch.setattr("bench.methods.Trainer.step", lambda *_: pytest.fail("a step of its own"))
    its = Record(tmp_path / "record.json", record({}))
    options = Options(torch.device("cpu"), 1.0, small=True, methods=("nonprivate", "dpfast"))
    assert not layers.run(its, options) and not layers.run(its, options)


# ---------------------------------------------------------------- the plots


def test_plots_say_what_is_drawn_and_where_it_was_made(tmp_path, drawn):
    kinds = {"kinds": {"linear": part(row("nonprivate"), row())}}
    for suite in (kinds, sweep(v64=part(row("nonprivate"), row(ways=["ghost"])))):
        layers.draw(record(suite), tmp_path / "record")
        text = " ".join(" ".join(drawn()).split())
        for what in ("a CPU", "2026-11-22", "c0ffee", "python -m dpfast bench", "median"):
            assert what in text
    layers.draw(record(kinds), tmp_path / "record")
    assert "p20–p80" in " ".join(drawn())


def test_a_way_stands_clear_of_lines_and_axes(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    points = {
        f"v{1 << k}": part(row("nonprivate"), row(ways=["instantiate" if k < 9 else "ghost"])) for k in range(6, 14)
    }
    layers.draw(record(sweep(**points)), tmp_path / "record")
    axes = figures[0].axes[0]
    frame = axes.get_window_extent()
    boxes = [text.get_window_extent() for text in axes.texts]
    dots = [axes.transData.transform(xy) for line in axes.lines for xy in line.get_xydata()]
    assert len(boxes) == 2 and all(text.get_bbox_patch().get_facecolor()[:3] == (1, 1, 1) for text in axes.texts)
    for box in boxes:
        assert box.x0 > frame.x0 and box.x1 < frame.x1 and box.y1 < frame.y1
        assert not any(box.contains(*dot) for dot in dots)
    monkeypatch.undo()
    plots.plt.close(figures[0])

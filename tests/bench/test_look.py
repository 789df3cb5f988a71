"""What a person sees of the benchmarks: where reports go, what the demo says first and last, and bars that are long."""

from pathlib import Path

import pytest

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")
pytest.importorskip("matplotlib", reason="the bench needs the extra 'demo'")

from bench import command, demo, plots
from bench.measure import ROOT

RECORD = ROOT / "bench" / "results" / "models-cpu-20261122-183350.json"


def test_a_report_goes_where_it_is_asked_to(tmp_path, capsys, monkeypatch):
    """And nowhere else; without a folder, beside its record."""
    monkeypatch.setattr(plots, "draw_ratios", lambda groups, path, note: (path.write_bytes(b"") and []) or [path])
    (tmp_path / "there").mkdir()
    own = tmp_path / "there" / RECORD.name
    own.write_text(RECORD.read_text())
    out = tmp_path / "new" / "here"
    assert command.main(["--report", str(own), "--out", str(out)]) == 0
    made = [f"{own.stem}-ratios.png", f"{own.stem}.md"]
    assert sorted(path.name for path in out.iterdir()) == made and [*own.parent.iterdir()] == [own]
    assert f"written: {out / made[1]}" in capsys.readouterr().out
    assert command.main(["--report", str(own)]) == 0
    assert sorted(path.name for path in own.parent.iterdir()) == sorted([own.name, *made])


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command.main(["--report", str(RECORD), "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


def test_long_bars_run_out_of_their_axis(tmp_path, monkeypatch):
    """No bar ends where its figure does not; each figure stands beside its bar, or in it at the axis' end."""
    figures = []
    monkeypatch.setattr(plots, "_written", lambda figure, path, dpi: figures.append(figure) or [path])
    values = {"dpfast": 1.2, "hooks": 7.0, "functorch": 57.0}
    rows = [
        {"method": name, "variant": "plain", "error": None, "time_ratio": {"median": x, "p20": x, "p80": x}}
        for name, x in values.items()
    ]
    plots.draw_ratios([("a model", rows)], tmp_path / "x.png", "a note")
    (axes,) = [one for one in figures[0].axes if one.get_visible()]
    assert [bar.get_width() for bar in axes.patches] == [*values.values()]
    end = axes.get_xlim()[1]
    texts = {text.get_text(): (text.xy[0], text.get_ha()) for text in axes.texts}
    assert texts == {"1.20": (1.2, "left"), "7.00": (7.0, "right"), "57.00 ▸": (end, "right")}
    width = figures[0].get_size_inches()[0] / 2 if len(figures[0].axes) > 1 else figures[0].get_size_inches()[0]
    smallest = min(text.get_fontsize() for text in (*axes.texts, *axes.get_yticklabels()))
    assert smallest * 830 / (72 * 2 * width) >= 9, "in pixels, where README shows two panels side by side"


def test_the_demo_says_what_it_does_and_what_comes_next(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "PNG", ROOT / "bench" / "out" / "none.png")
    monkeypatch.setattr(demo, "draw_demo", lambda *_: None)
    monkeypatch.setattr(demo, "check_first", lambda task: None)
    monkeypatch.setattr(demo, "train", lambda task, methods: [])
    monkeypatch.setattr(demo, "results", lambda task, runs: [])
    monkeypatch.setattr("sys.argv", ["demo"])
    assert demo.main() == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("A GroupNorm CNN on digits and a small GPT on CPython")
    ways = "privately with dpfast, privately with dpfast and a recorded step, privately with Opacus hooks"
    assert f"without privacy, {ways}" in lines[1]
    last = lines[lines.index("What next?") + 1 :]
    assert len(last) == 4 and lines[-1] == last[-1]
    for path in ("examples/image_cnn.py", "docs/guarantee.md"):
        assert any(path in line for line in last) and Path(ROOT, path).is_file()

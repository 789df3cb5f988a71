"""Plots are written as what their ending says, and a bad request is named before anything is drawn."""

import pytest
import torch

pytest.importorskip("matplotlib")

from dpfast.analysis.calibration import calibration_report
from dpfast.analysis.plots import Curve, curves, heat_maps, reliability_diagram, spectra


@pytest.fixture
def report():
    z = 2 * torch.randn(300, 3)
    return calibration_report(z, torch.randint(0, 3, (300,)), resamples=20)


MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml"}


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_written(ending, report, tmp_path):
    lines = {"loss": {"a": Curve([1, 2, 3], [3.0, 2.0, 1.0], [0.1, 0.1, 0.1]), "b": Curve([1, 2], [1.0, 1.5])}}
    drawn = [
        reliability_diagram({"a": report, "b": report}, tmp_path / f"reliability{ending}"),
        heat_maps({"accuracy": [[1.0, float("nan")], [3.0, 4.0]]}, [0.1, 1], [1, 2], tmp_path / f"maps{ending}"),
        curves(lines, tmp_path / f"curves{ending}", log="xy", guides={"loss": {"1/x": Curve([1, 3], [3.0, 1.0])}}),
        spectra({"HC": [1 + 0.1j, 1 - 0.1j, 0j, -0.5 + 0j]}, tmp_path / f"spectra{ending}"),
    ]
    for path in drawn:
        assert path.read_bytes().startswith(MAGIC[ending])


def test_the_same_file_for_the_same_plot(report, tmp_path):
    paths = [reliability_diagram({"a": report}, tmp_path / f"{k}.svg") for k in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_refused(report, tmp_path):
    with pytest.raises(ValueError, match=r"end it in \.png or \.svg"):
        reliability_diagram({"a": report}, tmp_path / "plot.jpg")
    with pytest.raises(ValueError, match="does not exist"):
        reliability_diagram({"a": report}, tmp_path / "no" / "plot.png")
    with pytest.raises(ValueError, match="at least one report"):
        reliability_diagram({}, tmp_path / "plot.png")
    with pytest.raises(ValueError, match=r"panels\['ECE'\]: give 2 rows of 1 values"):
        heat_maps({"ECE": [[1.0]]}, [0.1, 1.0], [1.0], tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())

"""explain prints the plan: layer, T, d, p, way, predicted and measured time, bytes kept."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import dpfast
from dpfast.planning import planner, unmeasured
from tests import snapshot
from tests.helpers import make_private
from tests.zoo import TinyGPT, every_layer, specimen


def table(capsys, model, batch) -> list[str]:
    dpfast.explain(model, batch)
    return [line for line in capsys.readouterr().out.splitlines() if line.strip()]


def row(lines: list[str], name: str) -> str:
    found = [line for line in lines if line.startswith(name) or line.strip(" |").startswith(name)]
    assert found, f"no row for {name} in\n" + "\n".join(lines)
    return found[0]


@every_layer
def test_every_trained_layer_has_a_row(name, capsys):
    model, inputs, _ = specimen(name)
    lines = table(capsys, model, inputs)
    for column in ("layer", "T", "d", "p", "way", "predicted ms", "measured ms", "kept bytes"):
        assert column in lines[0]
    for name_of_weight, _ in model.named_parameters():
        layer = name_of_weight.rpartition(".")[0]
        assert any(layer in line for line in lines[1:]), f"{name_of_weight} is not in the plan"


def test_it_says_that_no_rates_were_measured(capsys, monkeypatch):
    """Once for each kind of rates, whatever layers are planned with them; with measured ones nothing is to be said."""
    model, x = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)), torch.randn(4, 7, 6)
    measured = replace(unmeasured.CPU, unmeasured=None)
    for rates in (measured, replace(measured, unmeasured="rates predicted from a crystal ball: no device")):
        monkeypatch.setattr(planner, "rates_of", lambda *_, rates=rates: rates)
        said = [line for line in table(capsys, model, x) if line.startswith("predicted with")]
        assert said == ([] if rates is measured else [f"predicted with {rates.unmeasured}"])


def test_the_numbers_of_a_linear_layer(capsys):
    """T positions, d inputs, p outputs."""
    lines = table(capsys, nn.Sequential(nn.Linear(13, 17), nn.Tanh(), nn.Linear(17, 19)), torch.randn(3, 11, 13))
    assert {"11", "13", "17"} <= set(row(lines, "0").replace("|", " ").split())
    assert {"11", "17", "19"} <= set(row(lines, "2").replace("|", " ").split())


def test_the_numbers_of_a_convolution(capsys):
    """A linear layer over patches: T output positions, d = channels / groups × kernel."""
    model = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, groups=2))
    lines = table(capsys, model, torch.randn(3, 6, 9, 11))
    assert {str(4 * 5), str(3 * 9)} <= set(row(lines, "0").replace("|", " ").split())


def test_the_way_depends_on_the_shapes(capsys):
    """A wide layer on few positions, and a narrow one on many: not the same way."""
    wide = row(table(capsys, nn.Sequential(nn.Linear(1024, 1024)), torch.randn(8, 2, 1024)), "0")
    narrow = row(table(capsys, nn.Sequential(nn.Linear(4, 4)), torch.randn(8, 200, 4)), "0")
    known = ("ghost", "instantiate", "norm-gemm", "outer", "t = 1")
    ways = [next((w for w in known if w in line.lower()), None) for line in (wide, narrow)]
    assert ways[0] != ways[1], (wide, narrow)


def test_a_tied_weight_is_under_both_layers_that_use_it(capsys):
    lines = table(capsys, TinyGPT(), torch.randint(9, (3, 5)))
    assert row(lines, "tok")
    assert any("head" in line for line in lines)


def test_a_private_model_may_be_explained_too(capsys):
    model = nn.Sequential(nn.Linear(4, 3))
    plain = table(capsys, model, torch.randn(5, 4))
    wrapped, _, _ = make_private(model)
    for one, other in zip(plain[2:-2], table(capsys, wrapped, torch.randn(5, 4))[2:-2], strict=True):
        cells, others = (line.split()[:6] for line in (one, other))  # up to the predicted time
        assert cells == others


def test_what_is_proved_and_what_is_not(capsys):
    """The operator that a proof cannot settle, and its module."""

    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(torch.as_strided(self.inner(x).clone(), (len(x) // 2, 2, 3), (6, 3, 1)).tanh().view(-1, 3))

    assert table(capsys, nn.Linear(4, 3), torch.randn(6, 4))[-1].startswith("samples are kept apart: proved")
    said = "\n".join(table(capsys, Folded(), torch.randn(8, 4)))
    assert "no proof beyond" in said and "aten.tanh in the model (Folded)" in said


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_model_is_untouched(mode, capsys):
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.GroupNorm(1, 3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 2))
    model.train(mode)
    x = torch.randn(3, 2, 6)
    before, rng = snapshot.of_model(model), torch.get_rng_state()
    table(capsys, model, x)
    assert snapshot.of_model(model) == before
    assert torch.equal(rng, torch.get_rng_state())


def test_frozen_layers_cost_nothing(capsys):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    lines = table(capsys, model, torch.randn(6, 4))
    assert not any("0.weight" in line for line in lines)
    assert any("1.weight" in line or line.startswith("1") for line in lines)


def test_weight_and_bias_have_rows_of_their_own(capsys):
    lines = table(capsys, nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)), torch.randn(3, 2, 5))
    assert {line.split()[0] for line in lines[2:6]} == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert row(lines, "0.weight").split()[1:4] == ["2", "5", "4"]


def test_a_table_is_shown_once(capsys):
    """A notebook and Python's prompt show what a line ends in; that was printed already."""
    shown = dpfast.explain(nn.Linear(3, 2), torch.randn(2, 3))
    assert capsys.readouterr().out == f"{shown}\n"
    shown._ipython_display_()
    assert capsys.readouterr().out == "" and "Linear.weight" in shown and "\n" not in repr(shown)

"""The bench of packed rows: what is trained on is what it says, and every way is right before it is timed."""

import sys

import pytest
import torch

from bench import command, measure, packed
from dpfast import losses
from dpfast.capture.recorder import Recorder


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name, value in (("MOST_WARM_UP", 2), ("MIN_ROUNDS", 2), ("MAX_ROUNDS", 2), ("SLOW_ROUNDS", 2)):
        monkeypatch.setattr(measure, name, value)
    # trials that samples are apart take seconds, and are tested elsewhere
    monkeypatch.setattr(Recorder, "verifies", property(lambda _: False, lambda *_: None), raising=False)


def test_a_record_of_both_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["packed", "--small", "--seconds", "0.01", "--out", str(tmp_path)])
    packed.main()
    (path,) = tmp_path.glob("*.json")
    printed = capsys.readouterr().out
    assert printed.count("Opacus hooks, padded") == 2 and "wrong" not in printed and "Error" not in printed
    assert command.main(["--report", str(path)]) == 0
    assert "python -m bench.packed" in capsys.readouterr().out


def test_rows_are_full_and_samples_within_their_limits():
    rows = packed.samples(False)
    assert {sum(map(len, row)) for row in rows} == {packed.SIZES["full"]["length"]}
    assert all(16 <= len(x) <= 256 for row in rows for x in row)


@pytest.mark.parametrize("model", ["llama", "gpt"])
def test_packed_and_padded_are_one_loss(model):
    rows = packed.samples(True)
    plain = packed.build(model, True)
    ids, positions = packed.batch_of(rows, True)
    of_rows = losses.segment_cross_entropy(plain(ids, positions), ids, position_ids=positions)
    ids, labels = packed.batch_of(rows, False)
    torch.testing.assert_close(of_rows, losses.causal_lm_loss(plain(ids), labels))


def test_a_wrong_way_is_not_timed(monkeypatch):
    """A clipping norm that is not the one asked for is seen."""
    made = packed.step_of
    monkeypatch.setattr(
        packed, "step_of", lambda model, rows, way, lr, noise, C: made(model, rows, way, lr, noise, 2 * C)
    )
    part = packed.compared("gpt", {k: packed.WAYS[k] for k in ("nonprivate", "dpfast-padded")}, True, 0.01)
    wrong = part["figures"][1]
    assert wrong["error"].startswith("wrong: relative error") and "seconds" not in wrong

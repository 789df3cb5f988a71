"""The files of ``examples/`` that need no launcher of another product, each run with ``--smoke``."""

import contextlib
import gc
import importlib.util
import io
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.integrations.processes import Processes

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
SCRIPTS = {  # what each has to print
    "audit_model": r"one sample each: passed(?s:.)*batch in the model: NOT PRIVATE(?s:.)*compares samples: NOT PRIVATE",
    "bert_classifier": r"epoch 1: epsilon \d",
    "custom_layer": r"trained, epsilon \d(?s:.)*refused: the rule wrong of layer '2' is wrong for 'V'",
    "dp_sat": r"DP-SGD: .* epsilon (\S+) at(?s:.)*DP-SAT: .* epsilon \1 at",
    "image_cnn": r"epoch 1: test accuracy \d.* epsilon [78]\.\d",
    "lightning_callback": r"accuracy \d.* epsilon [34]\.\d",
    "lora_causal_lm": r"epoch 1: epsilon \d(?s:.)*1024 of \d+ parameters",
    "packed_sft": r"epoch 1: epsilon [78]\.\d+ at delta 0.0001(?s:.)*% padding",
    "transformers_trainer": r"epsilon [78]\.\d+ at delta 0.0001, after 2 steps",
    "preference_pairs": r"right way round: \d+ %(?s:.)*epsilon [78]\.\d+ at delta 0.001 for one preference pair",
    "trl_sft": r"epsilon [78]\.\d+ at delta 0.0001, after 2 steps",
}
NEEDS = {
    "bert_classifier": ("transformers",),
    "image_cnn": ("sklearn",),
    "lightning_callback": ("lightning",),
    "lora_causal_lm": ("transformers", "peft"),
    "packed_sft": ("transformers",),
    "transformers_trainer": ("transformers", "accelerate"),
    "preference_pairs": ("trl", "datasets"),
    "trl_sft": ("trl", "datasets"),
}
LAUNCHED = ("ddp", "fsdp")  # by torchrun


@pytest.fixture(autouse=True)
def as_it_was():
    """The Trainer collects garbage, which takes long among all modules' objects; and global state comes back."""
    gc.freeze()
    with torch.random.fork_rng():
        yield
    gc.unfreeze()


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.filterwarnings("ignore")
def test_it_runs(name, monkeypatch, capsys, tmp_path):
    missing = [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{name}.py needs {', '.join(missing)}, which its first lines say how to install")
    monkeypatch.setattr(sys, "argv", [name, "--smoke"])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert re.search(SCRIPTS[name], printed := capsys.readouterr().out), printed


def launched(rank: int, paths: list[str]) -> str:
    """What the scripts print on a rank. Processes meet once: what a script begins and ends with is done for all."""
    os.environ |= {"LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    dist.init_process_group = dist.destroy_process_group = lambda *_: None
    sys.argv[1:] = ["--smoke"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for path in paths:
            runpy.run_path(path, run_name="__main__")
    return printed.getvalue()


def test_those_of_several_processes(tmp_path):
    """One launch of two ranks of gloo, as torchrun would start them, runs both."""
    ranks = Processes(tmp_path / "ranks", 2)
    try:
        printed, nothing = ranks(launched, [str(FOLDER / f"{name}.py") for name in LAUNCHED])
    finally:
        ranks.end()
    assert isinstance(printed, str), printed
    assert "ddp: 2 ranks, the same weights to the bit" in printed and nothing == ""
    assert "fsdp: 2 ranks, 6 whole tensors, finite: True" in printed
    epsilons = re.findall(r"(\w+): epsilon (\S+) at delta", printed)
    assert [name for name, _ in epsilons] == ["ddp", "fsdp"] and len({value for _, value in epsilons}) == 1


def test_each_says_how_it_is_run_and_what_a_sample_is():
    for name in (*SCRIPTS, *LAUNCHED):
        text = (FOLDER / f"{name}.py").read_text()
        about = " ".join(text.split('"""')[1].split())
        assert f"examples/{name}.py``" in about and re.search(r"[Aa] sample is|samples of a real batch", about), name
        assert len(text.splitlines()) < 110, name

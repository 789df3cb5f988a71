"""``python -m dpfast doctor``, read as a user or a script would."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from dpfast import native, ops
from dpfast.__main__ import main
from dpfast.native import build
from dpfast.planning import rates
from tests.native.small import ROOT, python

LIBRARIES = [
    native.Library(
        "cpu", None, Path("/somewhere/libdpfast_cpu.so"), "cached", {"isas": "scalar", "compiler": "g++ 12"}
    ),
    native.Library("cuda", "the card is too old. To have them: buy another"),
]
ROWS = [
    ("standard_normal", "cpu", "native", "compiled library"),
    ("noisy_grad_", "cuda", "reference", "the card is too old"),
]


def sections(text: str) -> dict[str, list[list[str]]]:
    """``{title: rows}``, a row split into its columns."""
    out: dict[str, list[list[str]]] = {}
    for title, rows in re.findall(r"^(\S.*)\n((?:  .*\n)*)", text, re.MULTILINE):
        out[title] = [re.split(r"\s{2,}", row.strip()) for row in rows.splitlines()]
    return out


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(native, "status", lambda: LIBRARIES)
    monkeypatch.setattr(native, "why_not", lambda device: None if device == "cpu" else LIBRARIES[1].reason)
    monkeypatch.setattr(native, "instruction_set", lambda: "scalar")
    monkeypatch.setattr(ops, "backends", lambda: ROWS)


def test_what_is_here_and_what_is_used(here, capsys, monkeypatch):
    monkeypatch.setenv("DPFAST_CACHE_DIR", "/kept/here")
    monkeypatch.setenv("DPFAST_CPU_ISA", "scalar")
    assert main(["doctor"]) == 0
    found = sections(capsys.readouterr().out)
    assert {"dpfast", "torch", "triton", "opacus", "python"} == {name for name, _ in found["versions"]}
    assert re.search(r"uses scalar \(DPFAST_CPU_ISA=scalar\)", dict(found["devices"])["cpu"])
    cpu, cuda, cache = found["native libraries"]
    assert cpu[:2] == ["cpu", "cached"] and "libdpfast_cpu.so for scalar, by g++ 12" in cpu[2]
    assert cuda == ["cuda", "none", LIBRARIES[1].reason] and cache == ["cache", "in", "/kept/here"]
    assert found["ops"] == [list(row) for row in ROWS]


def test_where_the_rates_of_plans_are_from(here, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DPFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = torch.device("cpu")
    rows = lambda: {row[0]: row[1:] for row in said_by_doctor(capsys)["rates of plans"]}  # noqa: E731
    assert rows()["cpu"] == [
        "not measured",
        f"the first plan measures those of its dtype, and keeps them in {tmp_path}",
    ]
    assert rows()["cuda"][0] == "predicted" and "no CUDA device is here" in rows()["cuda"][1]
    rates.file_of(cpu, torch.float32, True).write_text("")
    rates.file_of(cpu, torch.bfloat16, False).write_text("")
    assert rows()["cpu"] == ["measured", f"convolution float32, linear bfloat16, in {tmp_path}"]


def said_by_doctor(capsys):
    assert main(["doctor"]) == 0
    return sections(capsys.readouterr().out)


def test_strict_fails_where_an_op_falls_back(here, capsys, monkeypatch):
    assert main(["doctor", "--strict"]) == 1
    assert "1 of 2 ops fall back to the reference:\n  the card is too old\n" in capsys.readouterr().out
    monkeypatch.setattr(ops, "backends", lambda: ROWS[:1])
    assert main(["doctor", "--strict"]) == 0
    assert "fall back" not in capsys.readouterr().out


def test_whoever_reads_may_stop(here, monkeypatch):
    """`doctor | head` is no error with a stack trace, and nothing is left to be written at exit."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["doctor"]) == 1


def test_alone_it_prints_the_help(capsys):
    assert main([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_the_command(tmp_path):
    """In a process of its own, in earnest: plain PyTorch on request, every op on it with the reason."""
    done = python(ROOT, "-W", "ignore", "-m", "dpfast", "doctor", "--strict", DPFAST_NATIVE="0")
    assert done.returncode == 1, done.stderr
    found = sections(done.stdout)
    assert [row[1:] for row in found["native libraries"][:2]] == [["none", "DPFAST_NATIVE=0"]] * 2
    assert len(found["ops"]) > 5
    for _, _, backend, reason in found["ops"]:
        assert backend == "torch" or (backend != "native" and reason == "DPFAST_NATIVE=0")
    assert not build.about(Path(build.__file__)), "no library, nothing to read"

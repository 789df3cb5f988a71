"""Every Python block of README and docs runs, and every command that they show has the options that they give it."""

import contextlib
import importlib.util
import io
import re
import socket
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfast
from dpfast.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
CODE = {name: BLOCK.findall(text) for name, text in PAGES.items()}
NEEDS = {
    "docs/fine-tuning.md": ("transformers", "peft"),
    "docs/trainers.md": ("transformers", "accelerate", "lightning"),
}
OPTIONAL = {"from trl import": "trl"}  # what a block needs that no other block of its page does


def objects() -> dict:
    """What a page takes for granted: the reader's own model, data and loop."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    data = TensorDataset(torch.randn(16, 8), torch.randint(0, 3, (16,)))
    x, y = data[:8]
    return {
        "torch": torch,
        "nn": nn,
        "DataLoader": DataLoader,
        "TensorDataset": TensorDataset,
        "dpfast": dpfast,
        "PrivacyEngine": dpfast.PrivacyEngine,
        "engine": dpfast.PrivacyEngine(accountant="rdp"),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": DataLoader(data, batch_size=8),
        "criterion": nn.CrossEntropyLoss(),
        "dataset": data,
        "x": x,
        "y": y,
    }


@pytest.fixture
def alone(monkeypatch):
    """The environment that torchrun gives a process that has no others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, blocks in CODE.items() if blocks])
def test_every_block_runs(name, tmp_path, monkeypatch, alone):
    """In order. A block that makes something private finds the reader's objects as they were at first."""
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    names = objects()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for number, block in enumerate(CODE[name], start=1):
        if any(mark in block and not importlib.util.find_spec(package) for mark, package in OPTIONAL.items()):
            continue
        if "make_private" in block:
            names |= objects()
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, f"{name}, block {number}", "exec"), names)


def test_there_are_blocks():
    """Guards the guard: also that each fence is closed, and of a kind that is known."""
    assert len(CODE["README.md"]) >= 1 and sum(map(len, CODE.values())) >= 15
    for name, text in PAGES.items():
        kinds = re.findall(r"^```(.*)$", text, re.M)
        assert set(kinds[::2]) <= {"python", "bash", "text", "mermaid"} and set(kinds[1::2]) <= {""}, name


def shown() -> list[tuple[str, str, list[str]]]:
    """Pages, commands of ours that they show, and their options."""
    found = []
    for name, text in PAGES.items():
        if name == "CHANGELOG.md":
            continue
        for words in re.findall(r"(?:python|torchrun[^\n`]*) -m dpfast ((?:[^`\n\\]|\\\n)*)", text):
            command, *rest = words.replace("\\\n", " ").split() or [""]
            found.append((name, command.strip(".,;:)"), re.findall(r"(?<!\S)(--[\w-]+)", " ".join(rest))))
    return found


def help_of(command: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        importlib.import_module(COMMANDS[command][0]).main(["--help"])
    return said.getvalue()


@pytest.mark.parametrize("command", sorted({command for _, command, _ in shown()} - {"", "--help"}))
def test_commands_have_their_options(command):
    assert command in COMMANDS
    options = {option for _, its, options in shown() if its == command for option in options}
    known = set(re.findall(r"--[\w-]+", help_of(command)))
    assert options <= known


def test_make_targets_are_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name, text in PAGES.items():
        if name != "CHANGELOG.md":
            assert set(re.findall(r"`make ([\w-]+)", text)) <= targets, name

"""A refusal names a section of docs/troubleshooting.md, the section is there, and it quotes what is said."""

import ast
import pickle
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.nn import functional as F

from dpfast import refusals
from tests.helpers import engine_of, make_private

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
SECTIONS = {re.sub(r"\W+", "-", part.splitlines()[0].lower()): part for part in re.split(r"^## ", PAGE, flags=re.M)[1:]}
CLASSES = {cls.__name__: cls for classes in refusals.topics().values() for cls in classes}
FILES = {path.relative_to(ROOT / "dpfast").as_posix(): path for path in (ROOT / "dpfast").rglob("*.py")}
ELSEWHERE = (
    "ops/",
    "reference/",
    "native/",
    "planning/",
    "analysis/",
    "cli/",
    "integrations/finetune/",
    "losses.py",
    "head_losses.py",
)
ARGUMENT = re.compile(r"^(…|[\w.]+)(\[.*?\])?( state)?(=|: )|^(logits|sizes|…) ")  # "name=value: remedy"
TOLD = {  # no refusals: errors that torch's own modules raise in the same place, and questions within a check
    "capture/running_pass.py": "… follow from values of the batch",
    "clipping/thresholds.py": "max_grad_norm has ",
    "dropin/registry.py": "… is not as its class made it",
    "engine.py": "plan names …",
    "integrations/trainer.py": "the batch has no labels",
    "layers/attention.py": "Need attn_mask",
    "layers/embedding_tables.py": ("per_sample_weights needs", "offsets must be given"),
    "optim/copies.py": "a private optimizer",
    "optim/optimizer.py": "a private optimizer has no shallow copy",
    "separation/draws.py": "other random numbers are drawn",
    "separation/experiment.py": ("other layers are reached", "an output has no batch dimension"),
}


@cache
def raised(path: Path) -> list[tuple[str, str]]:
    """Of each exception that a file makes: its class, and its message with … for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.endswith("Error"):
            found.append((call.func.id, "".join(map(words, call.args[:1]))))
    return found


def words(node: ast.expr) -> str:
    if isinstance(node, ast.BinOp):
        return words(node.left) + words(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


@cache
def texts(path: Path) -> str:
    """All that a file can say."""
    tree = ast.parse(path.read_text())
    return "\n".join(words(node) for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.Constant)))


def test_every_topic_has_its_section_and_every_section_its_topic():
    assert list(SECTIONS) == sorted(set(SECTIONS), key=list(SECTIONS).index)
    assert set(SECTIONS) == set(refusals.topics())
    assert "" not in refusals.topics()


def test_every_refusal_is_made_somewhere():
    made = {name for path in FILES.values() for name, _ in raised(path)}
    made |= {
        name for path in FILES.values() for name in re.findall(r"raise \((\w+) if|else (\w+)\)\(", path.read_text())
    }
    made = {one for name in made for one in ([name] if isinstance(name, str) else name)}
    missing = {name for name, cls in CLASSES.items() if name not in made and not cls.__subclasses__()}
    assert not missing


@pytest.mark.parametrize("topic", SECTIONS)
def test_what_a_section_quotes_is_said(topic):
    """And by an exception of that topic, if it is said by name."""
    quoted = [line.removeprefix("> ") for line in SECTIONS[topic].splitlines() if line.startswith("> ")]
    assert quoted
    said = [texts(path) for path in FILES.values()]
    for line in quoted:
        parts = [part.strip() for part in line.split("…") if part.strip()]
        assert any(all(part in text for part in parts) for text in said), line
        for path in FILES.values():
            for name, message in raised(path):
                if name in CLASSES and all(part in message for part in parts) and len(line) > 30:
                    assert CLASSES[name].topic == topic, (line, name)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(ELSEWHERE)])
def test_what_is_refused_has_a_topic(name):
    """A ValueError or RuntimeError is about the value of an argument, which it names first; else it is a refusal.

    Give what is refused for the guarantee's sake a class of dpfast/refusals.py.
    """
    for kind, message in raised(FILES[name]):
        if kind in ("ValueError", "RuntimeError") and not ARGUMENT.match(message):
            assert message.startswith(TOLD.get(name, ("\0",))), message


def test_a_message_ends_with_its_section():
    error = refusals.SamplesMeetError("the rows are added up")
    assert str(error) == "the rows are added up (see docs: troubleshooting#samples-meet)"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert isinstance(error, RuntimeError) and isinstance(error, refusals.LayoutError)


def test_a_refusal_that_quotes_another_names_its_own_section_alone():
    inner = refusals.RowsError("5 rows")
    outer = refusals.NotRecordedError(f"graphed: {inner}. Nothing was summed")
    assert str(outer) == "graphed: 5 rows. Nothing was summed (see docs: troubleshooting#graphed)"


class Meeting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        out = self.layer(x)
        return out - out.mean(0)


def refuse_layers(x, y):
    make_private(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)))


def refuse_mixing(x, y):
    model, *_ = make_private(Meeting())
    model(x)


def refuse_a_second_backward(x, y):
    model, *_ = make_private(nn.Linear(8, 4))
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()


def refuse_nothing(x, y):
    _, optimizer, _ = make_private(nn.Linear(8, 4))
    optimizer.step()


def refuse_16_bits(x, y):
    model, *_ = make_private(nn.Linear(8, 4).bfloat16())
    F.cross_entropy(model(x.bfloat16()), y).backward()


def refuse_a_loss_with_parameters(x, y):
    model, *_ = make_private(nn.Linear(8, 4))
    (F.cross_entropy(model(x), y) + model._module.weight.square().sum()).backward()


@pytest.mark.parametrize(
    ("refused", "topic"),
    [
        (refuse_layers, "layers"),
        (refuse_mixing, "samples-meet"),
        (refuse_a_second_backward, "second-backward"),
        (refuse_nothing, "nothing-to-release"),
        (refuse_16_bits, "mean-in-16-bits"),
        (refuse_a_loss_with_parameters, "outside-the-forward"),
    ],
)
def test_a_user_is_told_the_section(refused, topic):
    with pytest.raises(refusals.Refusal, match=rf"\(see docs: troubleshooting#{topic}\)$"):
        refused(torch.randn(6, 8), torch.randint(0, 4, (6,)))


def test_what_was_caught_before_is_still_caught():
    with pytest.raises(UnsupportedModuleError) as found:
        engine_of().validate(module=nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)))
    assert isinstance(found.value, ValueError)

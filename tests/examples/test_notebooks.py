"""The notebooks of ``examples/notebooks`` run, and what stands below their cells is what they print."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.notebook import outputs_of, texts

ROOT = Path(__file__).parents[2]
BOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def shape(text: str) -> str:
    """A text without its figures and the widths of its columns: noise, times and the machine are others each time."""
    return re.sub(r"[\s#%-]+", " ", re.sub(r"\d[\d.e+-]*", "#", text))


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_it_runs_and_its_outputs_are_in_place(path, tmp_path):
    """In a process of its own: what else was done to Opacus there would change what runs."""
    copied = shutil.copy(path, tmp_path)
    subprocess.run([sys.executable, "-m", "tests.examples.notebook", copied], cwd=ROOT, check=True)
    now = json.loads(Path(copied).read_text())
    for before, after in zip(json.loads(path.read_text())["cells"], now["cells"], strict=True):
        if before["cell_type"] == "code":
            assert before["execution_count"] == after["execution_count"]
            assert shape(texts(before)) == shape(texts(after)), "run: python -m tests.examples.notebook " + path.name


def test_there_are_two():
    assert [path.stem for path in BOOKS] == ["from_opacus", "tour"]


def test_a_cell_shows_what_jupyter_would():
    shared: dict = {}
    printed, value = outputs_of("a = 2\nprint(a)\na + 1", shared)
    assert printed["text"] == ["2\n"] and value["data"] == {"text/plain": ["3"]}
    assert outputs_of("b = a", shared) == [] and shared["b"] == 2
    with pytest.raises(ZeroDivisionError):
        outputs_of("1 / 0", shared)

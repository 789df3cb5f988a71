"""The site has every page. Links lead where they should: in the repository, on the site, on the package index."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dpfast

ROOT = Path(__file__).parents[2]
BASE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def loaded(name: str):
    """A file of ``docs/site``, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/site/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation():
    named = re.findall(r"^ +- [^:]+: ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(named) == sorted({*pages, "index.md"})  # which is README


def test_what_the_reference_describes_is_there():
    """The whole of ``dpfast.__all__`` is described by one line; the other lines name what they describe."""
    described = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert "dpfast" in described and dpfast.__all__
    for name in described:
        parts = name.split(".")
        files = [ROOT.joinpath(*parts[:n]).with_suffix(".py") for n in (len(parts), len(parts) - 1)]
        package = ROOT.joinpath(*parts) / "__init__.py"
        found = [path for path in (*files, package) if path.is_file()]
        assert found, name
        if files[0] not in found and package not in found:
            assert re.search(rf"^(class|def) {parts[-1]}\b", files[1].read_text(), re.M), name


@pytest.mark.parametrize(
    ("written", "folder", "on_site"),
    [
        ("[a](guarantee.md#the-unit)", "docs", "[a](guarantee.md#the-unit)"),
        ("[a](docs/guarantee.md)", ".", "[a](guarantee.md)"),
        ("[a](../README.md)", "docs", "[a](index.md)"),
        ("[a](../dpfast/engine.py)", "docs", f"[a]({BASE}/blob/main/dpfast/engine.py)"),
        ("![a](../bench/results/x.png)", "docs", "![a](bench/results/x.png)"),
        ("[a](https://example.org/x)", "docs", "[a](https://example.org/x)"),
        ("[a](#here)", "docs", "[a](#here)"),
    ],
)
def test_links_on_the_site(written, folder, on_site):
    assert loaded("hooks").within_site(written, folder) == on_site


def test_links_on_the_package_index():
    """README as setup.py gives it: nothing is relative, and each link is one of README's own."""
    command = [sys.executable, "setup.py", "--quiet", "--long-description"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    own = LINK.findall((ROOT / "README.md").read_text())
    there = [link for link in LINK.findall(shown) if "://" in link]
    assert len(there) == len(own) and LINK.findall(shown) == there
    for link, mine in zip(there, own, strict=True):
        kind = "raw" if mine.endswith(".png") else "blob"
        assert link == (mine if "://" in mine else f"{BASE}/{kind}/main/{mine}")


def test_docstrings_become_markdown():
    pytest.importorskip("griffe", reason="it is a part of the group docs, which the tests do not need")
    as_markdown = loaded("docstrings").as_markdown
    text = "See :class:`~a.B`.\n\n====  ======\nfew   of the\n      first\nmany  of it\n====  ======\n\nEnd."
    table = "|  |  |\n|---|---|\n| few | of the first |\n| many | of it |"
    assert as_markdown(text) == f"See `a.B`.\n\n{table}\n\nEnd."
    headed = "===  ===\na    b\n===  ===\n1    2\n===  ==="
    assert as_markdown(headed) == "| a | b |\n|---|---|\n| 1 | 2 |"

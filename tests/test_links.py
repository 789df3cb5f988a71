"""Pages name files that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
NAMED = re.compile(r"(?<![\w/.-])((?:dpfast|tests|bench|docs|examples|kernels|csrc)/[\w/.-]*\w)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths(page):
    text = page.read_text()
    targets = [page.parent / link for link in LINK.findall(text) if "://" not in link]
    targets += [ROOT / name for name in NAMED.findall(text) if not name.endswith(".so")]
    assert not [str(target) for target in targets if not target.exists()]


ANCHOR = re.compile(r"\]\(([^)\s#]*)#([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r" +", "-", re.sub(r"[^\w -]", "", text.lower()).strip()) for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors(page):
    for link, anchor in ANCHOR.findall(page.read_text()):
        if "://" not in link:
            assert anchor in anchors(page.parent / link if link else page), (link, anchor)


def test_there_are_links():
    """Guards the guard."""
    assert {page.name for page in PAGES} >= {"README.md", "CONTRIBUTING.md", "one_step.md"}
    assert LINK.findall((ROOT / "docs/one_step.md").read_text())

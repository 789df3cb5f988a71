"""The sdist is the repository, and the version is the same wherever it is written."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from email import message_from_bytes
from pathlib import Path

import pytest

from dpfast.version import __version__

ROOT = Path(__file__).parents[2]


def tracked() -> list[str]:
    """What git keeps of this folder; nothing where it is no repository, as in an unpacked sdist."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="no git repository to compare with: an unpacked sdist, perhaps"
)
def test_it_is_complete(tmp_path):
    files = tracked()
    assert {"tests/helpers.py", "csrc/register.cpp", "docs/guarantee.md", "Makefile", "CHANGELOG.md"} <= {*files}
    tree = tmp_path / "tree"
    for name in files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    # What a build leaves behind, and what is made for one machine, stays out.
    for name in (
        "dpfast/native/libdpfast_cpu.so",
        "tests/__pycache__/helpers.pyc",
        "bench/out/x.json",
        "build/x",
        "dist/x",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("")
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / f"dist/dpfast-{__version__}.tar.gz") as packed:
        names = {item.name.partition("/")[2] for item in packed if item.isfile()}
        told = message_from_bytes(packed.extractfile(f"dpfast-{__version__}/PKG-INFO").read())
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert names - made == {*files}

    assert told["Version"] == __version__ and told["License-Expression"] == "Apache-2.0"
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= {*told.get_all("Classifier")}
    assert {"Homepage", "Documentation", "Repository", "Issues", "Changelog", "Security"} == {
        url.partition(",")[0] for url in told.get_all("Project-URL")
    }
    assert "differential privacy" in told["Keywords"] and told["Description-Content-Type"] == "text/markdown"


def test_one_version():
    """Read from dpfast/version.py; the changelog and the citation follow it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "dpfast.version.__version__"}
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased" and re.fullmatch(rf"{re.escape(__version__)} - \d{{4}}-\d\d-\d\d", headings[1])
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == __version__

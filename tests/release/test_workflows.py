"""What runs elsewhere is valid here: workflows, issue forms, hooks, and the make targets that they call."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
MAKE = re.compile(r"\bmake ([a-z][\w-]*)")


def loaded(path: Path) -> dict:
    return yaml.load(path.read_text(), yaml.BaseLoader)  # "on" stays a word


def targets() -> set[str]:
    return {*re.findall(r"^([a-z][\w-]*):(?!=)", MAKEFILE, re.M)}


def test_every_target_that_is_no_file_is_phony():
    assert {*re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()} == targets()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows(path):
    flow = loaded(path)
    assert {"name", "on", "permissions", "jobs"} <= {*flow}
    called = set()
    for name, job in flow["jobs"].items():
        assert {"runs-on", "timeout-minutes", "steps"} <= {*job}, name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), (name, step)
            called |= {*MAKE.findall(step.get("run", ""))}
            assert re.fullmatch(r"[\w./-]+@v\d+", step.get("uses", "a@v1")), (name, step)
    assert called <= targets()
    # Variables on a command line of make are those that the Makefile reads.
    for variable in re.findall(r"\bmake [^\n]*?\b([A-Z_]+)=", path.read_text()):
        assert re.search(rf"^(oldest: )?{variable} \??:?=", MAKEFILE, re.M), variable


def test_what_the_workflow_covers():
    jobs = loaded(ROOT / ".github/workflows/ci.yml")["jobs"]
    assert {*jobs} == {"lint", "tests", "docs", "wheels", "gpu"}
    matrix = jobs["tests"]["strategy"]["matrix"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)", " ".join(classifiers))
    ways = {step["if"]: step["run"] for step in jobs["tests"]["steps"] if "if" in step}
    assert {*ways} == {f"matrix.torch == '{which}'" for which in matrix["torch"]}
    assert "GPU_RUNNER" in jobs["gpu"]["if"] and "GPU_RUNNER" in jobs["gpu"]["runs-on"]  # skipped without one


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms(path):
    form = loaded(path)
    if path.name == "config.yml":
        assert any("SECURITY.md" in link["about"] and "security" in link["url"] for link in form["contact_links"])
        return
    assert form["name"] and form["description"]
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea"), part
        assert part["attributes"]["value" if part["type"] == "markdown" else "label"]
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len({*ids}) == len(ids) > 0


def test_hooks_have_the_versions_of_the_constraints():
    repos = loaded(ROOT / ".pre-commit-config.yaml")["repos"]
    pinned = dict(re.findall(r"^([\w-]+)==(.*)$", (ROOT / "constraints.txt").read_text(), re.M))
    (ruff,) = [repo for repo in repos if repo["repo"].endswith("ruff-pre-commit")]
    assert ruff["rev"] == f"v{pinned['ruff']}"
    assert {hook["id"] for repo in repos for hook in repo["hooks"]} == {"ruff-check", "ruff-format", "mypy"}

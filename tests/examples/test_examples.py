"""The files of ``examples/``, run as a person runs them, with the product that each is for."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from opacus.accountants import RDPAccountant

from tests.examples.test_scripts import LAUNCHED, SCRIPTS

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    "federated_flower.py": ("flwr", "ray"),
    "federated_nvflare.py": ("nvflare",),
    "finetune_nemo.py": ("nemo_safe_synthesizer", "prv_accountant", "opt_einsum", "peft", "datasets"),
    "tabular_mostlyai.py": ("mostlyai",),
    "user_level.py": (),
}


def printed_by(name: str, folder: Path) -> str:
    """What the example prints, with ``--smoke``; skipped where its product is not installed."""
    missing = [package for package in EXAMPLES[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{name} needs {', '.join(missing)}: docs/migrating-from-opacus.md says how it is installed")
    settings = {"FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, str(ROOT / "examples" / name), "--smoke"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | settings, timeout=900)
    assert ran.returncode == 0, ran.stderr[-5000:]
    return ran.stdout


def epsilon_of(steps: int, noise_multiplier: float, sample_rate: float, delta: float) -> float:
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    return accountant.get_epsilon(delta)


def test_each_example_is_run_here_and_is_on_the_page():
    page = "".join((ROOT / "docs" / name).read_text() for name in ("migrating-from-opacus.md", "units.md"))
    ours = {f"{name}.py" for name in (*SCRIPTS, *LAUNCHED)}
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {*EXAMPLES} | ours
    assert [name for name in EXAMPLES if f"(../examples/{name})" not in page] == []


def test_flower(tmp_path):
    """Two rounds of eight steps: the second engine goes on from the first."""
    printed = printed_by("federated_flower.py", tmp_path)
    found = [float(x) for x in re.findall(r"round \d: epsilon (\S+) at", printed)]
    assert found == pytest.approx([epsilon_of(8, 1.0, 1 / 8, 1e-3), epsilon_of(16, 1.0, 1 / 8, 1e-3)], abs=1e-3)


def test_nvflare(tmp_path):
    """The budget is that of both rounds together, at each site."""
    printed = printed_by("federated_nvflare.py", tmp_path)
    found = {(site, int(k)): float(x) for site, k, x in re.findall(r"(site-\d), round (\d): epsilon (\S+) at", printed)}
    assert set(found) == {("site-1", 0), ("site-1", 1), ("site-2", 0), ("site-2", 1)}
    for site in ("site-1", "site-2"):
        assert found[site, 0] < found[site, 1] and 3.9 < found[site, 1] <= 4.0


def test_nemo(tmp_path):
    printed = printed_by("finetune_nemo.py", tmp_path)
    assert "linear layers by dpfast.dropin.registry" in printed
    assert 4.0 < float(re.search(r"epsilon (\S+) at delta", printed)[1]) <= 8.0


def test_mostlyai(tmp_path):
    printed = printed_by("tabular_mostlyai.py", tmp_path)
    assert re.search(r"make_private at training.py:\d+: fused", printed)
    assert 0 < float(re.search(r"epsilon (\S+) at delta", printed)[1]) <= 10.0


def test_users(tmp_path):
    """Four steps with a sample rate of 1 in 4: ``epsilon`` is within the budget that was asked for."""
    printed = printed_by("user_level.py", tmp_path)
    assert 7 < float(re.search(r"user-level epsilon (\S+) at delta", printed)[1]) <= 8.0

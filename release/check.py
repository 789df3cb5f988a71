"""``make check-wheel``: a wheel on a machine that has no compiler, where only it and what it requires is installed.

In a fresh environment, in an empty folder, with a PATH on which there is no compiler and CXX and CUDA_HOME that lead
nowhere: the wheel is installed, ``dpfast doctor --strict`` finds a kernel for every operation, and README's training
block runs a step. The library has to be the wheel's own: the cache, where a first use would build one, stays empty.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAINING = """
import torch
from dpfast import PrivacyEngine, native

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))
before = [p.detach().clone() for p in model.parameters()]
engine = PrivacyEngine()
model, optimizer, loader = engine.make_private(
    module=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    data_loader=torch.utils.data.DataLoader(data, batch_size=16),
    noise_multiplier=1.0,
    max_grad_norm=1.0,
)
x, y = next(iter(loader))
torch.nn.functional.cross_entropy(model(x), y).backward()
optimizer.step()
assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)), "nothing was trained"
assert 0 < engine.get_epsilon(delta=1e-5) < 10
library = native.library("cpu")
assert library.origin == "installed", library
print("one step on", library.path)
"""


def main() -> int:
    parser = argparse.ArgumentParser("python -m release.check", description="Install a wheel and train with it.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt", help="versions (%(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dpfast-check-") as scratch:
        check(given.wheel.resolve(), given.constraints.resolve(), Path(scratch))
    print(f"{given.wheel.name} works without a compiler")
    return 0


def check(wheel: Path, constraints: Path, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python, cache, empty = folder / "venv/bin/python", folder / "cache", folder / "empty"
    empty.mkdir()
    install = [str(python), "-m", "pip", "install", "-q", "--no-compile", "-c", str(constraints), str(wheel)]
    subprocess.run(install, check=True)
    away = ("PYTHONPATH", "DPFAST_NATIVE", "DPFAST_LIBRARY_CPU", "DPFAST_LIBRARY_CUDA", "DPFAST_TRITON")
    environment = {name: value for name, value in os.environ.items() if name not in away} | {
        "PATH": str(python.parent),
        "CXX": "/bin/false",
        "CUDA_HOME": "/nonexistent",
        "DPFAST_CACHE_DIR": str(cache),
    }
    doctor = [str(python.parent / "dpfast"), "doctor", "--strict"]
    subprocess.run(doctor, cwd=empty, env=environment, check=True)
    subprocess.run([str(python), "-c", TRAINING], cwd=empty, env=environment, check=True)
    if built := [path.name for path in cache.rglob("*.so")]:
        raise SystemExit(f"the wheel's own library was not used: {built} was built")


if __name__ == "__main__":
    sys.exit(main())

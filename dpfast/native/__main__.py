"""Build one library by hand: ``python -m dpfast.native cpu FOLDER``; ``DPFAST_LIBRARY_CPU`` then names it for use."""

import argparse
from pathlib import Path

from dpfast.native import build

parser = argparse.ArgumentParser("dpfast.native", description="Build one native library.")
parser.add_argument("device", choices=build.DEVICES)
parser.add_argument("folder", type=Path, help="for the library and its objects")
parser.add_argument("--sanitize", action="store_true", help="with the address and undefined-behaviour sanitizers")
asked = parser.parse_args()
plan = build.plan(asked.device, extra=build.SANITIZE if asked.sanitize else ())
built = build.run(plan, asked.folder / build.library_name(asked.device), asked.folder / f"objects-{asked.device}")
print(f"{built.library}: {built.seconds:.1f} s")

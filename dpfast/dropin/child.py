"""The main module of processes that a script under ``python -m dpfast run`` has spawned: patched, then the script's."""

import atexit
import multiprocessing.spawn
import os
import runpy
import sys

from dpfast.dropin import patch, run


def _report() -> None:
    if patch.calls():
        print(run.report(), file=sys.stderr)


patch.patch_opacus()
multiprocessing.spawn.get_preparation_data = run.preparation_data  # type: ignore[assignment]
atexit.register(_report)
globals().update(runpy.run_path(os.environ[run.CHILD], run_name="__mp_main__"))

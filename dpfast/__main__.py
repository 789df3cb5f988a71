"""The command line. Nothing is imported but the command that was asked for: help comes at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from dpfast.arguments import meant
from dpfast.version import __version__

COMMANDS = {
    "run": ("dpfast.dropin.run", "run a script that uses Opacus, unchanged, on the fused mode"),
    "finetune": ("dpfast.integrations.finetune.command", "fine-tune a Transformers model with differential privacy"),
    "doctor": ("dpfast.cli.doctor", "versions, devices, native libraries, and the backend of each op"),
    "bench": ("dpfast.cli.bench", "measure beside ordinary training and the peers, in a clone of the sources"),
    "reproduce": ("dpfast.analysis.reproduce", "the claims of two papers, tried on small data"),
}
USAGE = f"""usage: python -m dpfast [--version] {{{",".join(COMMANDS)}}} ...

Exact differentially private training in PyTorch, in one backward pass.

commands, each with --help:
""" + "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status. Without one, print the help."""
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name == "--version":
        print(f"dpfast {__version__}")
        return 0
    if name not in COMMANDS:
        print(
            f"dpfast: there is no command {name!r}{meant(name, COMMANDS)} See python -m dpfast --help", file=sys.stderr
        )
        return 2
    command, _ = COMMANDS[name]
    return importlib.import_module(command).main(rest)


if __name__ == "__main__":
    sys.exit(main())

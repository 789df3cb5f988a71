"""Runs tests in several processes, each on a share of them, and goes on where one dies:

    python -m bench.split PROCESSES OUT NAME -- tests/kernels -m "not gpu"

Each process leaves what pytest says in OUT/NAME-k.txt as it goes; at the end, or at Ctrl-C, their last words are
printed. A test that kills its process, or leaves its GPU unusable, fails alone: another process goes on behind it. The
exit status is 0 if every test passed, 130 after Ctrl-C, else 1.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

LOST = 70  # the exit status of a process whose GPU does nothing more, see tests/share.py
NONE = 5  # pytest's exit status where it had no test: a share may be empty
FINISHED = (0, 1, NONE)
WORTH_SAYING = re.compile(r"^(FAILED|ERROR|DIED|!!!|E  |\d+ |=+ .* in |.*has left the GPU)")
MOST_LINES = 40


class Share:
    """The tests of one process at a time."""

    def __init__(self, number: int, processes: int, out: Path, name: str, begun: Path, arguments: Sequence[str]):
        self.said, self.begun = out / f"{name}-{number}.txt", begun / str(number)
        self.died: list[str] = []
        self.status = 0
        self.command = [sys.executable, "-m", "pytest", "-q", "-ra", "--tb=short", "-p", "tests.share"]
        self.command += ["--share", f"{number}/{processes}", "--begun", str(self.begun), *arguments]
        self.file = self.said.open("w")
        self._start()

    def _start(self) -> None:
        self.before = self._count()
        self.process = subprocess.Popen(self.command, stdout=self.file, stderr=subprocess.STDOUT)

    def _count(self) -> int:
        return len(self.begun.read_text().splitlines()) if self.begun.exists() else 0

    def finish(self) -> None:
        """Wait for the last of its processes."""
        while True:
            status = self.process.wait()
            if status in FINISHED:
                self.status |= status == 1
                return
            self.status = 1
            if status > 0 and status != LOST:  # a bad argument or an internal error: no other process would do better
                return
            self.died.append(self.begun.read_text().splitlines()[-1] if self.begun.exists() else "before any test")
            self.file.write(f"\nDIED ({status}): {self.died[-1]}\n")
            self.file.flush()
            if self._count() == self.before:  # no test began: it gets no further
                return
            self._start()

    def last_words(self) -> list[str]:
        return [line for line in self.said.read_text().splitlines() if WORTH_SAYING.match(line)]


def main(given: Sequence[str]) -> int:
    processes, out, name = int(given[0]), Path(given[1]), given[2]
    status = 0
    with tempfile.TemporaryDirectory() as begun:
        shares = [Share(k, processes, out, name, Path(begun), given[4:]) for k in range(processes)]
        try:
            for share in shares:
                share.finish()
            status = int(any(share.status for share in shares))
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # timeout sends it to the process and to its group
            status = 130
            for share in shares:  # they have heard it too, and say what they know
                share.process.wait()
        for share in shares:
            share.file.close()
    for number, share in enumerate(shares):
        lines = share.last_words()
        print(f"{name} {number}: {lines[-1] if lines else 'it said nothing'}")
        for line in lines[:-1][:MOST_LINES]:
            print(f"  {line}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A parser of arguments that says what was probably meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Python's own, but for an option or a command that is not there: the one that is most like it is named."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in :class:`argparse.ArgumentParser`, with a suggestion for the first argument that is not known."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.unknown(unknown[0])
        return found

    def unknown(self, word: str) -> NoReturn:
        """Exit with status 2, with what may have been meant by ``word``."""
        options = [option for action in self._actions for option in action.option_strings]
        self.error(f"unrecognized arguments: {word}{meant(word.partition('=')[0], options)}")


def meant(word: str, among: Iterable[str]) -> str:
    """``"; did you mean …?"``, or nothing where nothing is alike."""
    close = difflib.get_close_matches(word, list(among), 1)
    return f"; did you mean {close[0]}?" if close else ""

"""What an ε is for, in words: one row, one user, one preference pair."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Unit:
    """What is added or removed between two data sets that (ε, δ) speaks of.

    ``str()`` of it completes "ε for ...".

    Attributes:
        row: what a row of the data set is.
        column: the column (or key) whose values tell which rows are of one user; "" if a list of ids does; None where
            each row is a unit.
        most: the rows of a user that a step takes at most.
    """

    row: str = "row"
    column: str | None = None
    most: int | None = None

    def __str__(self) -> str:
        if self.column is None:
            return f"one {self.row}"
        return f"one user ({self.column or 'by a list of ids'}), at most {self.most} {self.row}s of each in a step"

    @property
    def epsilon(self) -> str:
        """The name of ε in logs."""
        if self.column is None:
            return "epsilon" if self.row == "row" else f"epsilon_per_{self.row.replace(' ', '_')}"
        return f"epsilon_per_{self.column or 'user'}"

    def is_like(self, other: Unit) -> bool:
        """Whether steps of both add up to one ε; how many rows of a user a step takes makes no difference."""
        return (self.row, self.column) == (other.row, other.column)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)


ROW = Unit()

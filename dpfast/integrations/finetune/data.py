"""Texts from files, one sample a row: read, checked, tokenised and padded. Messages name rows, never their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dpfast.data.units import checked_ids
from dpfast.integrations.finetune.config import FinetuneError

IGNORED = -100
BUNDLED = Path(__file__).with_name("text.txt")
TABLES = {".csv": "read_csv", ".parquet": "read_parquet"}


@dataclass
class Rows:
    """Texts, and their classes where there are any."""

    texts: list[str]
    labels: list[Any] | None = None
    users: list[Any] | None = None  # whose each row is

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, chosen: Sequence[int]) -> Rows:
        """The rows with these numbers."""
        others = ([of[k] for k in chosen] if of is not None else None for of in (self.labels, self.users))
        return Rows([self.texts[k] for k in chosen], *others)


def read_rows(source: Any, text_column: str, label_column: str | None, unit_column: str | None = None) -> Rows:
    """Rows of a file, a folder of ``datasets``, a sequence of mappings or a DataFrame; None is the bundled text.

    In a plain text file every line that is not blank is a sample.

    Raises:
        FinetuneError: nothing there, a missing column, or rows that are no text; rows are counted from 1.
    """
    where = "the training data" if source is None or not isinstance(source, (str, Path)) else str(source)
    options = {"--text-column": text_column, "--label-column": label_column, "--unit-column": unit_column}
    asked = {option: name for option, name in options.items() if name is not None}
    if source is None or (isinstance(source, (str, Path)) and Path(source).suffix in (".txt", ".text")):
        if label_column is not None:
            raise FinetuneError(
                f"{where}: plain text has no labels; classification needs JSONL, CSV or Parquet (--train)"
            )
        if unit_column is not None:
            raise FinetuneError(f"{where}: plain text has no columns, and no {unit_column!r} (--unit-column)")
        lines = _text_of(BUNDLED if source is None else Path(source)).splitlines()
        rows = Rows([line.strip() for line in lines if line.strip()])
    else:
        found = columns_of(source, where, asked)
        rows = Rows(*(found.get(option) for option in ("--text-column", "--label-column", "--unit-column")))  # type: ignore
    if not rows.texts:
        raise FinetuneError(f"{where} is empty: give a file with at least one row")
    bad = [k for k, text in enumerate(rows.texts, 1) if not _is_text(text)]
    if bad:
        raise FinetuneError(f"{where}: {listed(bad)} no text in column {text_column!r}: take them out, or fill them in")
    if rows.labels is not None:
        rows.labels = [x.item() if isinstance(x, np.generic) else x for x in rows.labels]
        bad = [k for k, x in enumerate(rows.labels, 1) if not isinstance(x, (str, int)) or x == ""]
        if bad:
            raise FinetuneError(
                f"{where}: {listed(bad)} no class in column {label_column!r}: give a text or an integer"
            )
    if rows.users is not None:
        rows.users = checked_users(rows.users, where)
    return rows


def checked_users(users: Sequence[Any], where: str) -> list[Any]:
    """Ids that tell users apart.

    Raises:
        FinetuneError: a row has none; rows are counted from 1.
    """
    bad = [k for k, user in enumerate(users, 1) if isinstance(user, str) and not user.strip()]
    if bad:
        raise FinetuneError(f"{where}: {listed(bad)} no user (--unit-column): give each row one")
    try:
        return checked_ids(users)
    except ValueError as error:
        raise FinetuneError(f"{where}, --unit-column: {error}") from None


def _is_text(x: Any) -> bool:
    if not isinstance(x, str) or not x.strip():
        return False
    try:
        x.encode()  # JSON can have halves of surrogate pairs, which no tokenizer takes
    except UnicodeEncodeError:
        return False
    return True


def listed(rows: list[int]) -> str:
    """Some of the numbers of ``rows``, for a message."""
    shown = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    return f"row {shown} has" if len(rows) == 1 else f"rows {shown} have"


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FinetuneError(f"{path} cannot be read: {error.strerror or type(error).__name__}") from error
    except UnicodeDecodeError:
        raise FinetuneError(f"{path} is not UTF-8 text: convert it first") from None


def columns_of(source: Any, where: str, options: Mapping[str, str]) -> dict[str, list[Any]]:
    """The values of the columns asked for, by the options that name them.

    Raises:
        FinetuneError: there is no such column.
    """
    columns = [*options.values()]
    found = _columns(source, where, columns, [*options])
    return dict(zip(options, found, strict=True))


def _columns(source: Any, where: str, columns: list[str], options: list[str]) -> list[list[Any]]:
    if isinstance(source, (str, Path)):
        source = _table(Path(source))
    names = getattr(source, "column_names", None) or getattr(source, "columns", None)  # datasets; pandas
    if names is not None:
        names = [str(name) for name in names]
        _check_columns(where, columns, options, names, names, None)
        return [list(source[name]) for name in columns]
    rows = list(source)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise FinetuneError(f"{where}: row {number} is no object with columns: one JSON object a line is needed")
        if not all(name in row for name in columns):
            # What several rows have is the file's layout. What one row alone has could be anything, and is not shown.
            others = [other for other in rows if other is not row and isinstance(other, Mapping)]
            shown = [name for name in row if isinstance(name, str) and any(name in other for other in others)]
            _check_columns(where, columns, options, list(row), shown, number)
    return [[row[name] for row in rows] for name in columns]


def _check_columns(
    where: str, wanted: list[str], options: list[str], there: list[Any], shown: list[str], row: int | None
) -> None:
    for name, option in zip(wanted, options, strict=True):
        if name not in there:
            place = "" if row is None else f" in row {row}"
            known = f"; there are {', '.join(shown)}" if shown else ""
            raise FinetuneError(f"{where} has no column {name!r}{place}{known}: choose with {option}")


def _table(path: Path) -> Any:
    if path.is_dir():
        import datasets

        try:
            found = datasets.load_from_disk(str(path))
        except Exception as error:
            raise FinetuneError(f"{path} is no folder of datasets.save_to_disk ({type(error).__name__})") from None
        if isinstance(found, Mapping):
            raise FinetuneError(f"{path} holds several splits ({', '.join(found)}): give the folder of one of them")
        return found
    kind = path.suffix
    if kind in (".jsonl", ".ndjson", ".json"):
        return _json_lines(path)
    if kind not in TABLES:
        raise FinetuneError(f"{path}: unknown kind {kind!r}: .jsonl, .csv, .parquet and .txt can be read")
    if not path.is_file():
        raise FinetuneError(f"{path} cannot be read: no such file")
    if path.stat().st_size == 0:
        raise FinetuneError(f"{path} is empty: give a file with at least one row")
    import pandas

    # Everything in a CSV is text: pandas would take "NA" for a gap and "007" for a number.
    plain = {"dtype": str, "keep_default_na": False} if kind == ".csv" else {}
    try:
        return getattr(pandas, TABLES[kind])(path, **plain)
    except Exception as error:  # whatever a parser raises; its message may quote the row, so it is not shown
        raise FinetuneError(f"{path} cannot be read as {kind[1:]} ({type(error).__name__}): check the file") from None


def _json_lines(path: Path) -> Iterable[Any]:
    rows = []
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            raise FinetuneError(f"{path}: line {number} is no JSON: one object a line is needed") from None
    return rows


def class_names(labels: Iterable[Any]) -> list[Any]:
    """The classes, sorted: as numbers if all of them are, else as texts. Which there are is taken to be public."""
    names = set(labels)
    if all(isinstance(x, int) or x.lstrip("-").isdecimal() for x in names):
        return sorted(names, key=int)
    return sorted(names, key=str)


class Samples(Dataset):
    """Token ids of all samples in one array, and a label each for classification."""

    def __init__(
        self, ids: Sequence[Sequence[int]], labels: Sequence[int] | None = None, users: Sequence[Any] | None = None
    ):
        self.ends = np.cumsum([len(x) for x in ids], dtype=np.int64)
        self.tokens = np.fromiter((x for row in ids for x in row), dtype=np.int32, count=int(self.ends[-1]))
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.users = users

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, k: int) -> tuple[np.ndarray, int]:
        start = self.ends[k - 1] if k else 0
        return self.tokens[start : self.ends[k]], 0 if self.labels is None else int(self.labels[k])

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(np.diff(self.ends, prepend=0).max())

    def made_up(self, count: int) -> list[tuple[np.ndarray, int]]:
        """Samples of the longest length that are nobody's."""
        ids = np.arange(self.longest + count, dtype=self.tokens.dtype) % 8  # no two neighbours alike
        return [(ids[k : k + self.longest], 0) for k in range(count)]

    @property
    def _fingerprint(self) -> str:  # by this name DPTrainer knows data sets apart
        return self.digest

    @cached_property
    def digest(self) -> str:
        """A hash of everything in it."""
        found = hashlib.sha256()
        for part in (self.ends, self.tokens, self.labels):
            found.update(b"" if part is None else part.tobytes())
        if self.users is not None:
            found.update(repr(self.users).encode())
        return found.hexdigest()


def tokenised(rows: Rows, tokenizer: Any, context: int, truncate: bool, label_ids: Mapping[Any, int] | None) -> Samples:
    """Each row as one sample: never several rows in one, nor one row in several.

    Without labels an end-of-text token is put behind each text, where the tokenizer has one.

    Raises:
        FinetuneError: rows longer than ``context`` tokens, unless ``truncate``.
    """
    ids: list[list[int]] = []
    for start in range(0, len(rows.texts), 1000):
        ids += tokenizer(rows.texts[start : start + 1000], verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    if label_ids is None and end is not None:
        ids = [row if row and row[-1] == end else [*row, end] for row in ids]
    fallback = end if end is not None else tokenizer.pad_token_id
    ids = [row or [fallback] for row in ids]
    long = [k for k, row in enumerate(ids) if len(row) > context]
    if long and not truncate:
        raise FinetuneError(
            f"{len(long)} of {len(ids)} rows are longer than the context of {context} tokens (the first is row "
            f"{long[0] + 1}): --truncate cuts them, --context changes it"
        )
    for k in long:
        if label_ids is None:
            ids[k] = ids[k][:context]
        else:  # keeps the special tokens at both ends
            ids[k] = tokenizer(rows.texts[k], truncation=True, max_length=context)["input_ids"]
    labels = None
    if label_ids is not None:
        assert rows.labels is not None
        labels = [label_ids[x] for x in rows.labels]
    return Samples(ids, labels, rows.users)


class Collate:
    """Samples → ``input_ids``, ``attention_mask`` ``[B, T]``, ``labels`` (``[B, T]``, or ``[B]`` for classes), int64.

    Padded on the right to the longest of the batch, and to ``least`` tokens, in steps of 8 up to ``context``.
    Padding has label −100. An empty list gives tensors of no rows.
    """

    def __init__(self, pad: int, context: int, classes: bool, least: int = 1):
        self.pad, self.context, self.classes, self.least = pad, context, classes, least

    def __call__(self, samples: Sequence[tuple[np.ndarray, int]]) -> dict[str, Tensor]:
        longest = max([self.least, *(len(ids) for ids, _ in samples)])
        shape = (len(samples), min(self.context, -(-longest // 8) * 8))
        ids = torch.full(shape, self.pad)
        mask = torch.zeros(shape, dtype=torch.long)
        for k, (row, _) in enumerate(samples):
            ids[k, : len(row)] = torch.from_numpy(row.astype(np.int64))
            mask[k, : len(row)] = 1
        if self.classes:
            labels = torch.tensor([label for _, label in samples], dtype=torch.long)
        else:
            labels = ids.masked_fill(mask == 0, IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

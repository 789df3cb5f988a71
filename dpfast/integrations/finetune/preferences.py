"""Preference pairs from files: a prompt, and two texts of which one was chosen and the other rejected."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dpfast.integrations.finetune.config import FinetuneError
from dpfast.integrations.finetune.data import checked_users, columns_of, listed

COLUMNS = ("prompt", "chosen", "rejected")
Pair = tuple[list[int], list[int], list[int]]  # token ids of prompt, chosen and rejected text


@dataclass
class PairRows:
    """Pairs of texts, and whose each is where that is asked for."""

    texts: list[tuple[str, str, str]]
    users: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, chosen: Sequence[int]) -> PairRows:
        """The pairs with these numbers."""
        users = None if self.users is None else [self.users[k] for k in chosen]
        return PairRows([self.texts[k] for k in chosen], users)


def read_pairs(source: Any, unit_column: str | None = None) -> PairRows:
    """Rows with the columns prompt, chosen and rejected, from what :func:`read_rows` reads.

    Raises:
        FinetuneError: nothing there, a missing column, or rows that are no text; rows are counted from 1.
    """
    where = str(source) if isinstance(source, (str, Path)) else "the training data"
    options = {f"--dpo ({name})": name for name in COLUMNS}
    if unit_column is not None:
        options["--unit-column"] = unit_column
    found = columns_of(source, where, options)
    texts = [*zip(*(found[f"--dpo ({name})"] for name in COLUMNS), strict=True)]
    if not texts:
        raise FinetuneError(f"{where} is empty: give a file with at least one row")
    bad = [k for k, row in enumerate(texts, 1) if not all(isinstance(x, str) and x.strip() for x in row)]
    if bad:
        raise FinetuneError(f"{where}: {listed(bad)} no text in prompt, chosen or rejected: take them out")
    return PairRows(texts, checked_users(found["--unit-column"], where) if unit_column is not None else None)


class Pairs(Dataset):
    """Token ids of all pairs."""

    def __init__(self, pairs: Sequence[Pair], users: Sequence[Any] | None = None):
        self.pairs, self.users = pairs, users

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, k: int) -> Pair:
        return self.pairs[k]

    @property
    def longest(self) -> int:
        """Tokens of the longest text, its prompt included."""
        return max(len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in self.pairs)

    def made_up(self, count: int) -> list[Pair]:
        """Pairs of the longest length that are nobody's."""
        rest = self.longest - 1
        return [
            ([k % 8], [(k + j) % 8 for j in range(rest)], [(k + 3 * j) % 8 for j in range(rest)]) for k in range(count)
        ]

    @property
    def _fingerprint(self) -> str:  # by this name DPTrainer knows data sets apart
        return self.digest

    @cached_property
    def digest(self) -> str:
        """A hash of everything in it."""
        return hashlib.sha256(repr((self.pairs, self.users)).encode()).hexdigest()


def tokenised_pairs(rows: PairRows, tokenizer: Any, context: int, truncate: bool) -> Pairs:
    """Each text with its prompt, and an end-of-text token behind it; a completion begins where both texts may differ.

    Raises:
        FinetuneError: texts longer than ``context`` tokens, unless ``truncate``, or prompts as long as that.
    """
    end = tokenizer.eos_token_id
    pairs: list[Pair] = []
    long = []
    for number, (prompt, *texts) in enumerate(rows.texts, 1):
        alone, *both = tokenizer([prompt, *(prompt + text for text in texts)], verbose=False)["input_ids"]
        both = [ids if end is None or (ids and ids[-1] == end) else [*ids, end] for ids in both]
        common = min(_in_common(alone, ids) for ids in both)
        if common >= context:
            raise FinetuneError(
                f"row {number}: its prompt fills the context of {context} tokens: take it out, or give --context"
            )
        if any(len(ids) > context for ids in both):
            long.append(number)
        chosen, rejected = (ids[common:context] for ids in both)
        pairs.append((alone[:common], chosen, rejected))
    if long and not truncate:
        raise FinetuneError(
            f"{len(long)} of {len(pairs)} pairs are longer than the context of {context} tokens (the first is row "
            f"{long[0]}): --truncate cuts them, --context changes it"
        )
    return Pairs(pairs, rows.users)


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class CollatePairs:
    """Pairs → ``input_ids``, ``attention_mask`` and ``completion_mask`` ``[2n, T]``, chosen texts first, int64.

    Padded on the right to the longest of the batch, and to ``least`` tokens, in steps of 8 up to ``context``.
    """

    def __init__(self, pad: int, context: int, least: int = 1):
        self.pad, self.context, self.least = pad, context, least

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        rows = [(prompt, text) for side in (1, 2) for prompt, text in ((pair[0], pair[side]) for pair in pairs)]
        longest = max([self.least, *(len(prompt) + len(text) for prompt, text in rows)])
        ids = torch.full((len(rows), min(self.context, -(-longest // 8) * 8)), self.pad)
        mask, completion = torch.zeros_like(ids), torch.zeros_like(ids)
        for k, (prompt, text) in enumerate(rows):
            end = len(prompt) + len(text)
            ids[k, :end] = torch.tensor([*prompt, *text])
            mask[k, :end] = 1
            completion[k, len(prompt) : end] = 1
        return {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}

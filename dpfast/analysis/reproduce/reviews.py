"""Film snippets with scores, as texts of two classes: Hutto and Gilbert (ICWSM 2014), MIT licence.

They are in the source distribution of ``vaderSentiment==0.5``, which the user downloads: nothing of them is in this
package. Each snippet has the mean of at least 20 people's ratings, −4 to 4.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dpfast.analysis.reproduce.datasets import MissingData

SNIPPETS = "movieReviewSnippets_GroundTruth.txt"
INNER = "hutto_ICWSM_2014.tar.gz"  # in which they are, in the distribution
NAMES = ("vaderSentiment-0.5.zip", "vaderSentiment-0.5.tar.gz", "vaderSentiment-0.5")  # where pip leaves it
GET = "pip download --no-deps --no-binary :all: vaderSentiment==0.5"
NEUTRAL = 0.5  # scores up to it, either way, are of neither class
SHARES = {"train": 0.75, "holdout": 0.1, "test": 0.15}


@dataclass(frozen=True)
class Texts:
    """Texts and their classes: 0 for a negative score, 1 for a positive one."""

    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Reviews:
    """Three disjoint parts, stratified by class: to train on, to choose learning rates by, and to judge by.

    Attributes:
        neutral: snippets left out, as their score is about 0.
        repeated: snippets left out, as another one has the same text.
    """

    train: Texts
    holdout: Texts
    test: Texts
    neutral: int
    repeated: int


def load(path: Path | None = None, seed: int = 0) -> Reviews:
    """The film snippets.

    Args:
        path: of the distribution (zip, tar or folder) or of the file itself; None looks in the working directory, where
            ``pip download`` puts it.
        seed: of the split.

    Raises:
        MissingData: there is no such file, or it holds none; the text says how to get it.
    """
    return divided(parsed(_text(_found(path))), seed)


def parsed(text: str) -> list[tuple[float, str]]:
    """Scores and texts of the lines ``number, score, text``, with tabs between them.

    Raises:
        MissingData: a line is none of these.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split("\t")
        try:
            _, score, snippet = parts
            rows.append((float(score), snippet.strip()))
        except ValueError:
            raise MissingData(
                f"line {number} of {SNIPPETS} is not number, score and text: get it anew: {GET}"
            ) from None
    return rows


def divided(rows: list[tuple[float, str]], seed: int) -> Reviews:
    """Classes by the sign of the score, and a stratified split."""
    from sklearn.model_selection import train_test_split

    once = {text: score for score, text in reversed(rows)}  # a text that is there again counts where it is first
    kept = {text: int(score > 0) for text, score in reversed(once.items()) if abs(score) > NEUTRAL}
    texts, labels = list(kept), list(kept.values())
    share = SHARES["test"] + SHARES["holdout"]
    x, rest, y, y_rest = train_test_split(texts, labels, test_size=share, random_state=seed, stratify=labels)
    share = SHARES["test"] / share
    x2, x3, y2, y3 = train_test_split(rest, y_rest, test_size=share, random_state=seed, stratify=y_rest)
    neutral, repeated = len(once) - len(kept), len(rows) - len(once)
    return Reviews(Texts(x, y), Texts(x2, y2), Texts(x3, y3), neutral, repeated)


def _found(path: Path | None) -> Path:
    if path is not None:
        if not path.exists():
            raise MissingData(f"--data {path}: no such file or folder; get it: {GET}")
        return path
    for name in NAMES:
        if Path(name).exists():
            return Path(name)
    raise MissingData(f"--data reviews: there is no {NAMES[0]} here; get it: {GET}")


def _text(path: Path) -> str:
    try:
        content = _in_folder(path) if path.is_dir() else _in_file(path.name, path.read_bytes())
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise MissingData(f"--data {path}: cannot be read ({error}); get it anew: {GET}") from error
    if content is None:
        raise MissingData(f"--data {path}: there is no {SNIPPETS} in it; get it: {GET}")
    return content.decode("utf-8")


def _in_folder(folder: Path) -> bytes | None:
    for name in (SNIPPETS, INNER):
        for path in sorted(folder.rglob(name)):
            return _in_file(name, path.read_bytes())
    return None


def _in_file(name: str, content: bytes) -> bytes | None:
    """The snippets, be they ``content`` itself or in an archive that it is, or in one that is in that."""
    if name.endswith(SNIPPETS):
        return content
    for member, read in _members(name, content):
        if member.endswith((SNIPPETS, INNER)):
            return _in_file(member, read())
    return None


def _members(name: str, content: bytes) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The files of an archive, which are read in memory: nothing is written."""
    if name.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                yield member, partial(archive.read, member)
    elif name.endswith((".tar.gz", ".tgz", ".tar")):
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for info in tar:
                file = tar.extractfile(info)
                if file is not None:  # a folder has none
                    yield info.name, file.read

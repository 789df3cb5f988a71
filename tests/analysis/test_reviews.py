"""The film snippets: found in every shape that they come in, split without overlap, or refused in one line."""

import io
import tarfile
import zipfile

import pytest

pytest.importorskip("sklearn")

from dpfast.__main__ import main
from dpfast.analysis.reproduce import reviews
from dpfast.analysis.reproduce.datasets import MissingData

LINES = [f"{k}\t{(-1) ** k * (1 + k % 3)}\tfilm number {k} is é" for k in range(40)]
LINES += ["40\t0.5\tneither good nor bad", "41\t-0.4\tnor this", "42\t-2\tfilm number 0 is é"]
TEXT = "\r\n".join(LINES).encode()


def tarred(name, content):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as tar:
        folder = tarfile.TarInfo("top")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo(f"top/{name}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return held.getvalue()


def zipped(name, content):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("top/other.txt", "no")
        archive.writestr(f"top/{name}", content)
    return held.getvalue()


INNER = tarred(reviews.SNIPPETS, TEXT)
SHAPES = {
    "vaderSentiment-0.5.zip": zipped(reviews.INNER, INNER),
    "vaderSentiment-0.5.tar.gz": tarred(reviews.INNER, INNER),
    "vaderSentiment-0.5": {f"additional/{reviews.INNER}": INNER},
    "unpacked": {f"deep/er/{reviews.SNIPPETS}": TEXT},
    reviews.INNER: INNER,
    reviews.SNIPPETS: TEXT,
}


def put(path, content):
    for name, inside in content.items() if isinstance(content, dict) else [("", content)]:
        file = path / name if name else path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(inside)
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_that_it_comes_in(tmp_path, monkeypatch, name):
    found = reviews.load(put(tmp_path / name, SHAPES[name]))
    parts = [getattr(found, part) for part in reviews.SHARES]
    assert [len(part.texts) for part in parts] == [30, 4, 6]
    texts = [text for part in parts for text in part.texts]
    assert sorted(texts) == sorted(f"film number {k} is é" for k in range(40)), "each once, in one part"
    for part in parts:
        assert all(label == (int(text.split()[2]) + 1) % 2 for text, label in zip(part.texts, part.labels, strict=True))
        assert abs(sum(part.labels) / len(part.labels) - 0.5) < 0.01, "stratified"
    assert (found.neutral, found.repeated) == (2, 1)
    again = reviews.load(tmp_path / name)
    assert again.train == found.train and reviews.load(tmp_path / name, seed=1).train != found.train
    monkeypatch.chdir(tmp_path)
    if name in reviews.NAMES:
        assert reviews.load().train == found.train, "where pip leaves it"
    else:
        with pytest.raises(MissingData, match=r"there is no vaderSentiment-0\.5\.zip here; get it: pip download"):
            reviews.load()


BAD = {
    "gone.zip": (None, "no such file or folder"),
    "empty": ({"a.txt": b""}, "there is no movieReviewSnippets"),
    "other.zip": (zipped("other", b""), "there is no movieReviewSnippets"),
    "cut.zip": (SHAPES["vaderSentiment-0.5.zip"][:-30], "cannot be read"),
    "cut.tar.gz": (INNER[: len(INNER) // 2], "cannot be read"),
    "inner cut.zip": (zipped(reviews.INNER, INNER[:200]), "cannot be read"),
    "text.csv": (TEXT, "there is no movieReviewSnippets"),
    reviews.SNIPPETS: (TEXT + b"\r\n3 good film", "line 44 of movieReviewSnippets.*is not number, score and text"),
    f"scores/{reviews.SNIPPETS}": (b"1\tgood\tfilm", "line 1 of movieReviewSnippets"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line_that_says_how_to_get_it(tmp_path, capsys, name):
    content, message = BAD[name]
    if content is not None:
        put(tmp_path / name, content)
    with pytest.raises(MissingData, match=message):
        reviews.load(tmp_path / name)
    assert main(["reproduce", "finetune", "--data", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("dpfast reproduce: ") and reviews.GET in error

"""Images from IDX folders, and what is said, in one line, before anything is written, where there are none."""

import gzip

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from dpfast.__main__ import main
from dpfast.analysis.reproduce import datasets
from dpfast.analysis.reproduce.datasets import idx_data, images
from tests.analysis.idx import CLASSES, SIDE, idx_folder, packed, stripes


def test_images_come_back_pooled_and_split_by_seed(tmp_path):
    folder = idx_folder(tmp_path)
    x, y = stripes(64, 0)
    whole, labels = images(folder, 2)["train"]
    expected = x.to(torch.uint8).float().view(64, 8, 2, 8, 2).mean((2, 4)).flatten(1) / 255
    torch.testing.assert_close(whole, expected)
    assert torch.equal(labels, y)
    a, again, b = idx_data(folder, 0), idx_data(folder, 0), idx_data(folder, 1)
    assert (a.features, a.classes, len(a.train), len(a.holdout), len(a.test)) == (SIDE**2 // 4, CLASSES, 58, 6, 32)
    assert torch.equal(a.train.tensors[0], again.train.tensors[0])
    assert not torch.equal(a.train.tensors[0], b.train.tensors[0])
    both = torch.cat([a.train.tensors[0], a.holdout.tensors[0]])
    assert torch.equal(both.sort(0).values, whole.sort(0).values)


def test_delta_belongs_to_the_data(tmp_path, monkeypatch):
    folder = idx_folder(tmp_path)
    assert idx_data(folder, 0).delta == 1e-5
    monkeypatch.setattr(datasets, "FASHION_DELTA", 0.5)
    assert idx_data(folder, 0).delta == 1 / 58


def broken(folder, name, content):
    (folder / name).write_bytes(content)


BROKEN = {
    "missing": lambda f: (f / "t10k-labels-idx1-ubyte").unlink(),
    "no images at all": lambda f: [path.unlink() for path in f.iterdir()],
    "cut off": lambda f: broken(f, "train-labels-idx1-ubyte", packed(torch.arange(64))[:-1]),
    "no head": lambda f: broken(f, "train-labels-idx1-ubyte", b"\0\0"),
    "of floats": lambda f: broken(f, "train-labels-idx1-ubyte", b"\0\0\x0d\1\0\0\0\1\0\0\0\0"),
    "no gzip": lambda f: broken(f, "train-images-idx3-ubyte.gz", packed(stripes(64, 0)[0])),
    "gzip cut off": lambda f: broken(f, "train-images-idx3-ubyte.gz", gzip.compress(packed(stripes(64, 0)[0]))[:-9]),
    "a folder of its name": lambda f: [
        (f / "train-labels-idx1-ubyte").unlink(),
        (f / "train-labels-idx1-ubyte").mkdir(),
    ],
    "empty": lambda f: broken(f, "train-labels-idx1-ubyte", packed(torch.empty(0))),
    "other labels": lambda f: broken(f, "train-labels-idx1-ubyte", packed(torch.arange(63))),
    "a label of its own": lambda f: broken(f, "t10k-labels-idx1-ubyte", packed(torch.arange(32))),
    "not square": lambda f: broken(f, "t10k-images-idx3-ubyte.gz", gzip.compress(packed(torch.ones(32, 16, 18)))),
    "another size": lambda f: broken(f, "t10k-images-idx3-ubyte.gz", gzip.compress(packed(torch.ones(32, 18, 18)))),
    "too small": lambda f: broken(f, "train-images-idx3-ubyte.gz", gzip.compress(packed(torch.ones(64, 4, 4)))),
}


@pytest.mark.parametrize("experiment", ["dpsat", "calibration"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_one_line_and_nothing_is_written(how, experiment, tmp_path, capsys):
    folder, out = idx_folder(tmp_path / "data"), tmp_path / "out"
    BROKEN[how](folder)
    images.cache_clear()
    assert main(["reproduce", experiment, "--data", str(folder), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dpfast reproduce: --data") and str(folder) in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_missing_package_of_the_system_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "FASHION", tmp_path / "none")
    images.cache_clear()
    assert main(["reproduce", "dpsat", "--data", "fashion-mnist", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "apt-get install dataset-fashion-mnist" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

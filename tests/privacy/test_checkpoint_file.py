"""A checkpoint's file: nobody else can read it, it is whole or not there, and none can run code."""

import io
import os
import pickle
import stat
from contextlib import suppress

import numpy as np
import opacus
import pytest
import torch

from dpfast.checkpoints import read, written
from tests.helpers import engine_of, loader_of
from tests.ops.noisy import same
from tests.privacy.test_noise_checkpoint import Run, batches


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


class Settings:
    """A class of a user's own."""


def mode(path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def test_a_file_is_its_owners_from_its_first_byte(tmp_path, monkeypatch):
    """Whatever the umask, also where one that all could read was there before, and through a link."""
    path, link, seen = tmp_path / "run.pt", tmp_path / "last.pt", []
    path.write_bytes(b"of before")
    path.chmod(0o666)
    link.symlink_to(path)
    whole = torch.save

    def save(state, file, *args, **kwargs):
        seen.extend(mode(part) for part in tmp_path.iterdir() if part.name.startswith("."))
        whole(state, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    before = os.umask(0)
    try:
        Run().train(batches(1)).save(link)
    finally:
        os.umask(before)
    assert seen == [0o600] and mode(path) == 0o600
    assert link.is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "run.pt"]
    Run().load(str(link))


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    Run().train(batches(1)).save(path)
    before = path.read_bytes()

    def full(state, file, *args, **kwargs):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            Run().save(path)
    with pytest.raises(KeyboardInterrupt), written(path) as file:
        file.write(b"half of it")
        raise KeyboardInterrupt
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    with pytest.raises(FileNotFoundError):
        Run().save(tmp_path / "nowhere" / "run.pt")


def test_a_device_is_no_file_to_replace():
    Run().save("/dev/null")
    assert not os.path.isfile("/dev/null") and os.path.exists("/dev/null")


@pytest.mark.parametrize("entry", ["checkpoint_dict", "privacy_accountant_state_dict", "noise_scheduler_state_dict"])
def test_no_file_runs_code(tmp_path, entry):
    """As one of Opacus' own checkpoints, that somebody has changed, does when Opacus loads it."""
    path, target = tmp_path / "run.pt", tmp_path / "was_here"
    run = Run().train(batches(1))
    run.save(path)
    held = torch.load(path, weights_only=True)
    held[entry] = Evil(target)
    torch.save(held, path)
    other = Run()
    before = other.values()
    for kwargs in ({}, {"torch_load_kwargs": {"weights_only": True, "map_location": "cpu"}}):
        with pytest.raises(ValueError, match=r"holds (posix|os)\.mkdir"):
            other.engine.load_checkpoint(path=path, module=other.wrapped, optimizer=other.optimizer, **kwargs)
    with pytest.raises(ValueError, match="weights_only=False"):
        other.engine.load_checkpoint(
            path=path, module=other.wrapped, optimizer=other.optimizer, torch_load_kwargs={"weights_only": False}
        )
    assert not target.exists() and same(other.values(), before)
    with suppress(AttributeError, TypeError, ValueError):  # of what the code has returned
        opacus.PrivacyEngine.load_checkpoint(other.engine, path=path, module=other.wrapped)
    assert target.exists(), "the test's own file is harmless"


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    """Refused when it is saved, by name, not when a week of training is to be loaded; a class can be allowed."""
    run, path = Run().train(batches(1)), tmp_path / "run.pt"
    with pytest.raises(ValueError, match=r"Settings.*add_safe_globals"):
        run.save(path, checkpoint_dict={"settings": Settings()})
    assert not list(tmp_path.iterdir())
    with torch.serialization.safe_globals([Settings]):
        run.save(path, checkpoint_dict={"settings": Settings()})
        assert isinstance(Run().load(path)["settings"], Settings)


def test_numbers_and_arrays_of_numpy_are_no_code(tmp_path):
    """Noise multipliers and learning rates often are; a hidden object in an array is refused still."""
    run, path = Run(noise_multiplier=np.float64(1.5)).train(batches(1)), tmp_path / "run.pt"
    mine = {"losses": np.arange(3.0), "best": np.float32(2.5), "kind": np.dtype("int64"), "epoch": np.int64(3)}
    run.save(path, checkpoint_dict=mine)
    other = Run()
    rest = other.load(path)
    assert rest["best"] == 2.5 and rest["epoch"] == 3 and (rest["losses"] == np.arange(3)).all()
    assert other.engine.accountant.history == [(1.5, 1.0, 1)] and type(other.engine.accountant.history[0][0]) is float
    torch.save({"x": np.array([Evil(tmp_path / "was_here")], dtype=object)}, path)
    with pytest.raises(ValueError, match=r"mkdir|ObjectDType"):
        read(path)
    assert not (tmp_path / "was_here").exists()


def test_a_file_that_is_none():
    for content in (b"", b"text", pickle.dumps({"a": 1})[:-3]):
        with pytest.raises(ValueError, match="no checkpoint that can be read"):
            read(io.BytesIO(content))


@pytest.mark.parametrize("opacus_mode", ["hooks", "ghost"])
def test_opacus_own_modes_have_the_same_files(tmp_path, opacus_mode):
    """Their noise is torch's; file, reading and accounting are ours."""
    engine, model = engine_of(), torch.nn.Linear(5, 3)
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader_of(6, 3),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=opacus_mode,
    )
    path = tmp_path / "run.pt"
    engine.save_checkpoint(path=path, module=made[0], optimizer=made[1])
    assert mode(path) == 0o600
    engine.load_checkpoint(path=path, module=made[0], optimizer=made[1])

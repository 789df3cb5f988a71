"""A library is code: what another user has put into the cache, or can, is not loaded."""

import os

import pytest

from dpfast import native
from dpfast.native import build, cache
from tests.native.test_build import needs_compiler
from tests.native.test_load import apart, store, told  # noqa: F401 (fixtures)

pytestmark = pytest.mark.compiles


@needs_compiler
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702, 0o1777])
def test_a_folder_that_others_write_to(apart, store, caplog, mode):  # noqa: F811
    """With or without a library in it, with or without a compiler; and what to do is said."""
    store.mkdir()
    store.chmod(mode)
    assert not native.available("cpu")
    (line,) = told(caplog)
    assert f"{store} can be written by others (mode {mode & 0o777:03o})" in line and f"chmod go-w {store}" in line
    assert not list(store.iterdir())
    store.chmod(mode & ~0o022)
    native.reset()
    assert native.library("cpu").origin == "built now"


@needs_compiler
@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_a_library_that_others_write_to(apart, store, monkeypatch, caplog, mode, compiler):  # noqa: F811
    path, _ = cache.library("cpu")
    path.chmod(mode)
    if not compiler:  # then one of the same sources would do
        monkeypatch.setenv("CXX", "/nonexistent")
    assert not native.available("cpu")
    (line,) = told(caplog)
    assert f"{path} can be written by others" in line and f"chmod go-w {path}" in line
    path.chmod(0o755)
    native.reset()
    assert native.library("cpu").origin == "cached"


@needs_compiler
@pytest.mark.parametrize("what", ["folder", "library"])
def test_what_is_another_users(apart, store, monkeypatch, caplog, what):  # noqa: F811
    path, _ = cache.library("cpu")
    theirs = store if what == "folder" else path
    real = os.stat_result

    class Theirs(type(path)):
        def stat(self, **kwargs):
            found = super().stat(**kwargs)
            return real([*found[:4], 4321, *found[5:]]) if self == type(self)(theirs) else found

    monkeypatch.setattr(cache, "Path", Theirs)
    assert not native.available("cpu")
    (line,) = told(caplog)
    assert f"{theirs} belongs to the user of number 4321" in line and "chmod" in line


@needs_compiler
def test_what_is_roots_serves_everybody(apart, store, monkeypatch):  # noqa: F811
    """An administrator's own cache, which users read."""
    path, _ = cache.library("cpu")
    if os.stat(path).st_uid != 0:
        pytest.skip("only root can leave what is root's")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cache.library("cpu") == (path, False)


@needs_compiler
def test_a_wide_umask_is_no_alarm(apart, store):  # noqa: F811
    """Groups of one user, as many systems have them: what we build is ours alone all the same."""
    before = os.umask(0)
    try:
        path, new = cache.library("cpu")
    finally:
        os.umask(before)
    assert new and not path.stat().st_mode & 0o022 and not store.stat().st_mode & 0o077
    assert cache.library("cpu") == (path, False) and build.about(path)["device"] == "cpu"

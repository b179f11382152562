"""What differs on Windows, on a system that is made to look like it."""

import errno
import fcntl
import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest

from vitface import files, lock
from vitface.errors import CheckpointError


@pytest.fixture
def windows_lock(monkeypatch):
    """`vitface.lock` as Windows imports it: without fcntl, and with an msvcrt that notes where it locks."""
    places = []

    def locking(descriptor, mode, count):
        places.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, count))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("windows_lock", lock.__file__)
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        spec.loader.exec_module(module)
    module.places = places
    return module


def test_a_folder_is_locked_behind_its_text(windows_lock, tmp_path):
    with windows_lock.folder_lock(tmp_path):
        assert windows_lock.places == [(1 << 30, 2, 1)]
        with (
            pytest.raises(CheckpointError, match=rf"in use by another process \(process {os.getpid()}\)"),
            windows_lock.folder_lock(tmp_path),
        ):
            pass
    with windows_lock.folder_lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()}"


def test_one_who_comes_later_waits(windows_lock, tmp_path, monkeypatch):
    slept = []
    with open(tmp_path / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def sleep(seconds):
            slept.append(seconds)
            if len(slept) == 3:
                fcntl.flock(other, fcntl.LOCK_UN)

        monkeypatch.setattr(windows_lock.time, "sleep", sleep)
        with windows_lock.waiting_lock(tmp_path / "lock"):
            assert len(slept) == 3


def test_another_error_of_the_lock_is_not_taken_for_another_process(windows_lock, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(windows_lock.msvcrt, "locking", full)
    with pytest.raises(OSError, match="Input/output error"), windows_lock.folder_lock(tmp_path):
        pass


class WindowsOs:
    """os, where a folder cannot be opened and a link to a folder is never replaced; without the right to make links
    unless `links`."""

    def __init__(self, links):
        self.links = links

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, flags):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def symlink(self, target, link, target_is_directory=False):
        if not self.links:
            error = OSError(errno.EINVAL, "A required privilege is not held by the client")
            error.winerror = 1314
            raise error
        assert target_is_directory
        os.symlink(target, link)

    def replace(self, old, new):
        if os.path.lexists(new):
            raise PermissionError(errno.EACCES, "Access is denied", str(new))
        os.replace(old, new)


@pytest.fixture
def windows_files(monkeypatch):
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    return lambda links: monkeypatch.setattr(files, "os", WindowsOs(links))


def test_a_folder_needs_no_fsync_and_a_link_is_replaced(windows_files, tmp_path):
    windows_files(links=True)
    for name in ("step-1", "step-2"):
        files.make_folder(tmp_path / name)
        files.replace_link(tmp_path / "last", name)
        assert os.readlink(tmp_path / "last") == name


def test_without_the_right_to_make_links_there_are_none(windows_files, tmp_path):
    windows_files(links=False)
    files.replace_link(tmp_path / "last", "step-1")
    assert not list(tmp_path.iterdir())


def test_another_error_of_a_link_stays_what_it_is(monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "symlink", full)
    with pytest.raises(OSError, match="No space left"):
        files.replace_link(tmp_path / "last", "step-1")

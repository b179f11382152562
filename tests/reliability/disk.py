"""A stand-in for the operating system in `vitface.files`: it numbers every change, records it, and can fail at one.

And a model of a disk that replays what was recorded up to a power loss.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from vitface import files
from vitface.training.runs import checkpoint


class Disk:
    """While it is plugged in, `ops` fills; before operation `at` (in the middle, if it is a write), `fault` strikes."""

    def __init__(self, monkeypatch, at: int | None = None, fault: Callable[[], None] | None = None):
        self.ops: list[tuple] = []
        self.at, self.fault, self.fired = at, fault, False
        self.names: dict[int, Path] = {}
        monkeypatch.setattr(files, "os", self)
        monkeypatch.setattr(files, "shutil", self)
        monkeypatch.setattr(checkpoint, "shutil", self)
        monkeypatch.setattr(files, "open", self.open_file, raising=False)

    def __getattr__(self, name):
        return getattr(os, name)

    def change(self, *op) -> None:
        self.ops.append(op)
        if len(self.ops) - 1 == self.at and self.fault is not None:
            self.fired = True
            self.fault()

    def open(self, path, flags):
        descriptor = os.open(path, flags)
        self.names[descriptor] = Path(path)
        return descriptor

    def fsync(self, descriptor):
        self.change("fsync", self.names[descriptor])
        os.fsync(descriptor)

    def mkdir(self, path):
        self.change("mkdir", Path(path))
        os.mkdir(path)

    def rename(self, old, new):
        self.change("rename", Path(old), Path(new))
        os.rename(old, new)

    replace = rename

    def symlink(self, target, path, target_is_directory=False):
        self.change("symlink", target, Path(path))
        os.symlink(target, path)

    def rmtree(self, path, ignore_errors=False):
        for file in list(Path(path).glob("*"))[:1]:
            file.unlink()  # a fault comes in the middle
            self.change("rmtree", Path(path))
        shutil.rmtree(path, ignore_errors=ignore_errors)

    def open_file(self, path, mode):
        if mode == "rb":
            return open(path, mode)
        self.change("create", Path(path))
        return _File(self, Path(path), mode)


class _File:
    def __init__(self, disk, path, mode):
        self.disk, self.path, self.file = disk, path, open(path, mode)  # noqa: SIM115, closed by __exit__

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.disk.change("write", self.path, data)
        self.file.write(data[len(data) // 2 :])

    def flush(self):
        self.file.flush()

    def fileno(self):
        self.disk.names[self.file.fileno()] = self.path
        return self.file.fileno()


class Folder:
    """Names as they are, as they were at the last fsync of the folder, and what changed since."""

    def __init__(self):
        self.names: dict[str, object] = {}
        self.synced: dict[str, object] = {}
        self.pending: list[tuple[str, object | None]] = []

    def set(self, name, node):
        self.pending.append((name, node))
        if node is None:
            self.names.pop(name, None)
        else:
            self.names[name] = node

    def sync(self):
        self.synced, self.pending = dict(self.names), []

    def after_power_loss(self, rule):
        if rule == "kept":
            return self.names
        names = {**self.synced, **dict(self.pending[-1:] if rule == "reordered" else [])}
        return {name: node for name, node in names.items() if node is not None}


class Content:
    def __init__(self):
        self.data, self.synced = b"", True

    def after_power_loss(self, rule):
        if self.synced or rule == "kept":
            return self.data
        half = len(self.data) // 2
        return {"empty": b"", "zeros": bytes(len(self.data)), "torn": self.data[:half] + bytes(half)}[rule]


FILE_RULES, NAME_RULES = ("kept", "empty", "zeros", "torn"), ("kept", "dropped", "reordered")


def replay(ops: list[tuple], root: Path, target: Path, file_rule: str, name_rule: str, fsync: bool = True) -> None:
    """Writes to `target` what a disk may hold of `root` if the power fails after `ops`.

    Of a folder that was not fsynced since, changes of names are all there, none, or only the last one; a file that was
    not fsynced has all of its data, none, zeros, or half of it. `fsync` False is a program that forgot to.
    """
    tree = Folder()

    def find(path: Path):
        node = tree
        for name in path.relative_to(root).parts:
            node = node.names[name]
        return node

    for name, *args in ops:
        if name in ("mkdir", "create"):
            find(args[0].parent).set(args[0].name, Folder() if name == "mkdir" else Content())
        elif name == "write":
            content = find(args[0])
            content.data, content.synced = args[1], False
        elif name == "fsync" and fsync:
            node = find(args[0])
            if isinstance(node, Folder):
                node.sync()
            else:
                node.synced = True
        elif name == "rename":
            node = find(args[0])
            find(args[0].parent).set(args[0].name, None)
            find(args[1].parent).set(args[1].name, node)
        elif name == "symlink":
            find(args[1].parent).set(args[1].name, args[0])
        elif name == "rmtree":
            find(args[0].parent).set(args[0].name, None)
    _write(tree, target, file_rule, name_rule)


def _write(node, path: Path, file_rule: str, name_rule: str) -> None:
    if isinstance(node, Folder):
        path.mkdir()
        for name, child in node.after_power_loss(name_rule).items():
            _write(child, path / name, file_rule, name_rule)
    elif isinstance(node, Content):
        path.write_bytes(node.after_power_loss(file_rule))
    else:
        path.symlink_to(node)

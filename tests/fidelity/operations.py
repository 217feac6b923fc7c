"""Random operations of a host: a plan is a pure function of its seed.

The generator keeps a model of the tree, so that it never has to look (a look is an event too), and
spells each step ("save as editors do") as the system calls that make it up.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from tests.fidelity.calls import Call, Executor, Step

Kind = Literal["file", "dir", "symlink", "fifo", "socket"]

MAX_FILES = 70
MAX_DIRECTORIES = 14
MAX_DEPTH = 5
MAX_HELD = 6
MIN_WATCHED = 4


class Node:
    """An inode of the model."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.links = 0
        self.watched = False
        self.children: dict[bytes, Node] = {}  # of a directory
        self.parent: Node | None = None  # of a directory
        self.name = b""  # of a directory

    @property
    def path(self) -> bytes:
        if self.parent is None:
            return self.name
        return self.parent.path + self.name + b"/"

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1

    def within(self, other: Node) -> bool:
        node: Node | None = self
        while node is not None and node is not other:
            node = node.parent
        return node is other

    def tree(self) -> Iterator[Node]:
        yield self
        for child in self.children.values():
            yield from child.tree()


class Entry(NamedTuple):
    directory: Node
    name: bytes
    node: Node

    @property
    def path(self) -> bytes:
        return self.directory.path + self.name


@dataclass(frozen=True)
class Plan:
    """What to prepare, what to watch, what to do."""

    setup: list[Call]
    directories: list[bytes]
    files: list[bytes]
    steps: list[Step]


@dataclass
class Held:
    node: Node
    slot: int
    flags: int


NAMES = [
    *(b"a", b"b", b"c.txt", b"main.py", b"index.html", b".hidden", b"-n", b"x" * 15, b"x" * 16),
    *(b"with space", b" lead", b"trail ", b"quote'\"", b"new\nline", b"tab\t", b"back\\slash"),
    *(b"*?[", "grün".encode(), "日本語.txt".encode(), "🦀".encode()),
    *(b"\xff\xfe", b"latin-\xe9", b"\x01\x7f"),
    *(b"l" * 255, "é".encode() * 127 + b"x"),
]

WEIGHTS = {
    "create": 8,
    "create_write": 10,
    "append": 8,
    "overwrite": 5,
    "truncate": 4,
    "chmod": 5,
    "chown": 3,
    "utime": 5,
    "setxattr": 3,
    "read": 6,
    "readdir": 4,
    "fallocate": 1,
    "copy": 2,
    "unlink": 8,
    "rename_inside": 6,
    "rename_across": 6,
    "rename_over": 5,
    "exchange": 4,
    "noreplace": 3,
    "save_atomic": 6,
    "save_vim": 3,
    "link": 5,
    "symlink": 3,
    "mkdir": 5,
    "rmdir": 3,
    "rmtree": 3,
    "rename_dir": 4,
    "fifo": 2,
    "fifo_io": 1,
    "bind": 1,
    "move_out": 3,
    "move_in": 4,
    "move_dir_out": 1,
    "move_dir_in": 1,
    "hold_open": 5,
    "hold_use": 7,
    "hold_close": 4,
    "two_writers": 2,
    "flash": 5,
    "recreate": 5,
    "replace_kind": 2,
}


@dataclass
class Generator:
    """Makes the plan of one writer. `top` is a directory of its own, with a slash, or empty."""

    seed: int
    watch_files: bool = False
    top: bytes = b""
    without: frozenset[str] = frozenset()
    only: frozenset[str] = frozenset()
    _outside: list[tuple[bytes, Node]] = field(default_factory=list)
    _held: dict[int, Held] = field(default_factory=dict)
    _serial: int = 0

    def plan(self, steps: int) -> Plan:
        self._rng = random.Random(self.seed)
        self._root = Node("dir")
        self._root.name = self.top
        setup, directories, files = self._prepare()
        kinds = [k for k in WEIGHTS if k not in self.without and (not self.only or k in self.only)]
        weights = [WEIGHTS[kind] for kind in kinds]
        makers = {kind: getattr(self, "_" + kind) for kind in kinds}
        result: list[Step] = []
        refused = 0
        while len(result) < steps:
            kind = self._rng.choices(kinds, weights)[0]
            if calls := makers[kind]():
                result.append(Step(kind, tuple(calls)))
                refused = 0
            elif (refused := refused + 1) > 1000:
                raise ValueError(f"none of these is possible any more: {', '.join(kinds)}")
        return Plan(setup, directories, files, result)

    def paths(self) -> set[bytes]:
        """All that exists at the end of the plan."""
        return {entry.path for entry in self._entries()}

    def _prepare(self) -> tuple[list[Call], list[bytes], list[bytes]]:
        rng = self._rng
        setup = [Call("mkdir", (self.top,))] if self.top else []
        tree = ["a", "a/b", "a/b/c", "d é", "e", "e/f", "g h"]
        nodes = [self._root]
        for path in [name.encode() for name in tree] + [b"\xff\xfe"]:
            parent, _, name = path.rpartition(b"/")
            above = self._root
            for part in parent.split(b"/") if parent else []:
                above = above.children[part]
            setup.append(Call("mkdir", (self.top + path,)))
            nodes.append(self._add(above, name, "dir"))
        for node in nodes:
            node.watched = rng.random() < 0.6
        for node in rng.sample(nodes, 3):
            node.watched = True
        entries: list[Entry] = []
        for node in nodes:
            for _ in range(rng.randint(1, 3)):
                name = self._fresh(node)
                setup += self._creation(node.path + name)
                entries.append(Entry(node, name, self._add(node, name, "file")))
        name = self._fresh(nodes[1])
        setup.append(Call("mkfifo", (nodes[1].path + name,)))
        entries.append(Entry(nodes[1], name, self._add(nodes[1], name, "fifo")))
        directories = [node.path.rstrip(b"/") or b"." for node in nodes if node.watched]
        if not self.watch_files:
            return setup, directories, []
        watched = rng.sample(entries, 10)
        for entry in watched:
            entry.node.watched = True
        return setup, directories, [entry.path for entry in watched]

    # The model.

    def _add(self, directory: Node, name: bytes, kind: Kind) -> Node:
        return self._attach(directory, name, Node(kind))

    def _attach(self, directory: Node, name: bytes, node: Node) -> Node:
        assert name not in directory.children
        directory.children[name] = node
        node.links += 1
        if node.kind == "dir":
            node.parent, node.name = directory, name
        return node

    def _detach(self, entry: Entry) -> Node:
        del entry.directory.children[entry.name]
        entry.node.links -= 1
        return entry.node

    def _nodes(self) -> list[Node]:
        return [node for node in self._root.tree() if node.kind == "dir"]

    def _entries(self, *kinds: Kind) -> list[Entry]:
        return [
            Entry(directory, name, node)
            for directory in self._nodes()
            for name, node in directory.children.items()
            if not kinds or node.kind in kinds
        ]

    def _entry(self, *kinds: Kind) -> Entry | None:
        """Pick an entry, of a watched directory more often than not."""
        entries = self._entries(*kinds)
        if self._rng.random() < 0.7:
            seen = [e for e in entries if e.directory.watched or e.node.watched]
            entries = seen or entries
        return self._rng.choice(entries) if entries else None

    def _directory(self) -> Node:
        nodes = self._nodes()
        if self._rng.random() < 0.7:
            nodes = [node for node in nodes if node.watched] or nodes
        return self._rng.choice(nodes)

    def _fresh(self, directory: Node) -> bytes:
        """Return a name that is free in the directory, often one that was used before."""
        rng = self._rng
        for _ in range(8):
            name = rng.choice(NAMES)
            if name not in directory.children:
                return name
        self._serial += 1
        return b"n" * rng.randint(0, 40) + b"%d" % self._serial

    def _full(self) -> bool:
        return len(self._entries("file", "symlink", "fifo", "socket")) >= MAX_FILES

    def _spared(self, *nodes: Node) -> bool:
        """Watches are never renewed: most watched inodes live, lest a long run see nothing."""
        doomed = {node for node in nodes if node.watched and node.links <= nodes.count(node)}
        if not doomed:
            return False
        if self._rng.random() < 0.8:
            return True
        left = {node for node in self._root.tree() if node.watched} - doomed
        return any(
            sum(node.kind == "dir" for node in left) < MIN_WATCHED
            if one.kind == "dir"
            else sum(node.kind != "dir" for node in left) < MIN_WATCHED
            for one in doomed
        )

    def _is_held(self, node: Node) -> bool:
        return any(held.node is node for held in self._held.values())

    # The steps: each returns its calls, or nothing if it is not possible now.

    def _size(self) -> int:
        return self._rng.choice([1, 10, 100, 5000])

    def _creation(self, path: bytes, size: int = 0, extra: int = 0) -> list[Call]:
        calls = [Call("open", (0, path, os.O_WRONLY | os.O_CREAT | extra))]
        if size:
            calls.append(Call("write", (0, size)))
        return [*calls, Call("close", (0,))]

    def _create(self) -> list[Call]:
        if self._full():
            return []
        directory = self._directory()
        path = directory.path + (name := self._fresh(directory))
        self._add(directory, name, "file")
        access = self._rng.choice([os.O_WRONLY, os.O_RDWR, os.O_RDONLY])
        flags = access | os.O_CREAT | self._rng.choice([0, os.O_EXCL, os.O_TRUNC])
        return [Call("open", (0, path, flags)), Call("close", (0,))]

    def _create_write(self) -> list[Call]:
        if self._full():
            return []
        directory = self._directory()
        path = directory.path + (name := self._fresh(directory))
        self._add(directory, name, "file")
        opened, closed = self._creation(path)
        writes = [Call("write", (0, self._size())) for _ in range(self._rng.randint(1, 3))]
        return [opened, *writes, closed]

    def _append(self) -> list[Call]:
        entry = self._entry("file")
        return self._appending(entry.path) if entry else []

    def _appending(self, path: bytes) -> list[Call]:
        return [
            Call("open", (0, path, os.O_WRONLY | os.O_APPEND)),
            Call("write", (0, self._size())),
            Call("close", (0,)),
        ]

    def _overwrite(self) -> list[Call]:
        entry = self._entry("file")
        return self._creation(entry.path, self._size(), os.O_TRUNC) if entry else []

    def _truncate(self) -> list[Call]:
        entry = self._entry("file")
        return [Call("truncate", (entry.path, self._rng.choice([0, 7, 9000])))] if entry else []

    def _chmod(self) -> list[Call]:
        if not (entry := self._entry("file", "dir", "fifo", "socket")):
            return []
        return [Call("chmod", (entry.path, self._rng.choice([0o600, 0o644, 0o755, 0o777])))]

    def _chown(self) -> list[Call]:
        entry = self._entry()
        return [Call("chown", (entry.path, self._rng.choice([0, 1, 1000])))] if entry else []

    def _utime(self) -> list[Call]:
        if not (entry := self._entry()):
            return []
        atime, mtime = (self._rng.randint(1, 1 << 31) for _ in range(2))
        which = self._rng.choice([(atime, mtime), (atime, None), (None, mtime)])
        return [Call("utime", (entry.path, *which))]

    def _setxattr(self) -> list[Call]:
        entry = self._entry("file", "dir")
        return [Call("setxattr", (entry.path, b"v%d" % self._rng.randrange(9)))] if entry else []

    def _read(self) -> list[Call]:
        if not (entry := self._entry("file")):
            return []
        return [
            Call("open", (0, entry.path, os.O_RDONLY)),
            Call("read", (0, 100)),
            Call("close", (0,)),
        ]

    def _readdir(self) -> list[Call]:
        return [Call("listdir", (self._directory().path,))]

    def _fallocate(self) -> list[Call]:
        if not (entry := self._entry("file")):
            return []
        return [
            Call("open", (0, entry.path, os.O_RDWR)),
            Call("fallocate", (0, 4096)),
            Call("ftruncate", (0, 5)),
            Call("close", (0,)),
        ]

    def _copy(self) -> list[Call]:
        entry = self._entry("file")
        if not entry or self._full():
            return []
        directory = self._directory()
        path = directory.path + (name := self._fresh(directory))
        self._add(directory, name, "file")
        return [
            Call("open", (0, entry.path, os.O_RDONLY)),
            Call("open", (1, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)),
            Call("copy", (0, 1, 100)),
            Call("close", (0,)),
            Call("close", (1,)),
        ]

    def _unlink(self) -> list[Call]:
        entry = self._entry("file", "symlink", "fifo", "socket")
        if not entry or self._spared(entry.node):
            return []
        self._detach(entry)
        return [Call("unlink", (entry.path,))]

    def _rename_inside(self) -> list[Call]:
        if not (entry := self._entry("file", "symlink", "fifo", "socket")):
            return []
        name = self._fresh(entry.directory)
        self._attach(entry.directory, name, self._detach(entry))
        return [Call("rename", (entry.path, entry.directory.path + name))]

    def _rename_across(self) -> list[Call]:
        entry = self._entry("file", "symlink", "fifo", "socket")
        directory = self._directory()
        if not entry or directory is entry.directory:
            return []
        name = self._fresh(directory)
        if entry.name not in directory.children and self._rng.random() < 0.7:
            name = entry.name
        self._attach(directory, name, self._detach(entry))
        return [Call("rename", (entry.path, directory.path + name))]

    def _rename_over(self) -> list[Call]:
        entry = self._entry("file", "symlink", "fifo", "socket")
        target = self._entry("file", "symlink", "fifo", "socket")
        if not entry or not target or entry[:2] == target[:2] or self._spared(target.node):
            return []
        if entry.node is not target.node:  # else two names of one inode: rename(2) does nothing
            self._detach(target)
            self._attach(target.directory, target.name, self._detach(entry))
        return [Call("rename", (entry.path, target.path))]

    def _exchange(self) -> list[Call]:
        one, two = self._entry(), self._entry()
        if not one or not two or one.node is two.node:
            return []
        for entry, other in ((one, two), (two, one)):
            if entry.node.kind != "dir":
                continue
            if other.directory.within(entry.node) or self._too_deep(entry.node, other.directory):
                return []
        self._detach(one)
        self._detach(two)
        self._attach(two.directory, two.name, one.node)
        self._attach(one.directory, one.name, two.node)
        return [Call("rename_exchange", (one.path, two.path))]

    def _too_deep(self, node: Node, below: Node) -> bool:
        height = max((n.depth for n in node.tree() if n.kind == "dir"), default=0) - node.depth
        return below.depth + 1 + height > MAX_DEPTH

    def _noreplace(self) -> list[Call]:
        if not (entry := self._entry("file", "symlink", "fifo", "socket")):
            return []
        other = self._entry()
        if other and self._rng.random() < 0.3:
            return [Call("rename_noreplace", (entry.path, other.path))]
        name = self._fresh(entry.directory)
        self._attach(entry.directory, name, self._detach(entry))
        return [Call("rename_noreplace", (entry.path, entry.directory.path + name))]

    def _save_atomic(self) -> list[Call]:
        """Write a temporary file and rename it over the old one."""
        entry = self._entry("file")
        if not entry or self._spared(entry.node):
            return []
        temporary = self._fresh(entry.directory)
        path = entry.directory.path + temporary
        self._detach(entry)
        self._add(entry.directory, entry.name, "file")
        opened, written, closed = self._creation(path, self._size(), os.O_EXCL)
        calls = [opened, written, Call("fsync", (0,)), closed]
        if self._rng.random() < 0.5:
            calls.append(Call("chmod", (path, 0o644)))
        return [*calls, Call("rename", (path, entry.path))]

    def _save_vim(self) -> list[Call]:
        """Probe with a file 4913, rename the old file to name~, write anew, remove the backup."""
        entry = self._entry("file")
        if not entry or len(entry.name) > 254 or self._spared(entry.node):
            return []
        backup, probe = entry.name + b"~", b"4913"
        if entry.directory.children.keys() & {backup, probe}:
            return []
        self._detach(entry)
        self._add(entry.directory, entry.name, "file")
        probe, backup = entry.directory.path + probe, entry.directory.path + backup
        opened, written, closed = self._creation(entry.path, self._size(), os.O_TRUNC)
        return [
            *self._creation(probe, extra=os.O_EXCL),
            Call("chown", (probe, 0)),
            Call("unlink", (probe,)),
            Call("rename", (entry.path, backup)),
            opened,
            written,
            Call("fsync", (0,)),
            closed,
            Call("chmod", (entry.path, 0o644)),
            Call("unlink", (backup,)),
        ]

    def _link(self) -> list[Call]:
        entry = self._entry("file", "fifo")
        if not entry or self._full():
            return []
        directory = self._rng.choice([entry.directory, self._directory()])
        name = self._fresh(directory)
        self._attach(directory, name, entry.node)
        return [Call("link", (entry.path, directory.path + name))]

    def _symlink(self) -> list[Call]:
        if self._full():
            return []
        directory = self._directory()
        name = self._fresh(directory)
        self._add(directory, name, "symlink")
        target = self._rng.choice([b"a", b"../nowhere", b"t" * 300])
        return [Call("symlink", (target, directory.path + name))]

    def _mkdir(self) -> list[Call]:
        directory = self._directory()
        if len(self._nodes()) >= MAX_DIRECTORIES or directory.depth >= MAX_DEPTH:
            return []
        name = self._fresh(directory)
        self._add(directory, name, "dir")
        return [Call("mkdir", (directory.path + name,))]

    def _rmdir(self) -> list[Call]:
        empty = [entry for entry in self._entries("dir") if not entry.node.children]
        if not empty or self._spared((entry := self._rng.choice(empty)).node):
            return []
        self._detach(entry)
        return [Call("rmdir", (entry.path,))]

    def _rmtree(self) -> list[Call]:
        entry = self._entry("dir")
        if not entry or self._spared(*entry.node.tree()):
            return []
        return [*self._removal(entry.node), Call("rmdir", (self._drop(entry),))]

    def _drop(self, entry: Entry) -> bytes:
        self._detach(entry)
        return entry.path

    def _removal(self, directory: Node) -> list[Call]:
        calls: list[Call] = []
        for name, node in list(directory.children.items()):
            if node.kind == "dir":
                calls += self._removal(node)
            path = self._drop(Entry(directory, name, node))
            calls.append(Call("rmdir" if node.kind == "dir" else "unlink", (path,)))
        return calls

    def _rename_dir(self) -> list[Call]:
        entry = self._entry("dir")
        directory = self._directory()
        if not entry or directory.within(entry.node) or self._too_deep(entry.node, directory):
            return []
        empty = [
            e for e in self._entries("dir") if not e.node.children and e.node is not entry.node
        ]
        if empty and self._rng.random() < 0.2:
            target = self._rng.choice(empty)
            if target.node is entry.directory or target.node.within(entry.node):
                return []
            if self._spared(target.node) or self._too_deep(entry.node, target.directory):
                return []
            self._detach(target)
            directory, name = target[:2]
        else:
            name = self._fresh(directory)
        self._attach(directory, name, self._detach(entry))
        return [Call("rename", (entry.path, directory.path + name))]

    def _fifo(self) -> list[Call]:
        if self._full():
            return []
        directory = self._directory()
        name = self._fresh(directory)
        self._add(directory, name, "fifo")
        return [Call("mkfifo", (directory.path + name,))]

    def _fifo_io(self) -> list[Call]:
        if not (entry := self._entry("fifo")):
            return []
        return [
            Call("open", (0, entry.path, os.O_RDWR | os.O_NONBLOCK)),
            Call("write", (0, 10)),
            Call("read", (0, 10)),
            Call("close", (0,)),
        ]

    def _bind(self) -> list[Call]:
        directory = self._directory()
        name = self._fresh(directory)
        if len(name) > 40 or self._full():
            return []
        self._add(directory, name, "socket")
        return [Call("bind", (directory.path + name,))]

    def _beyond(self) -> bytes:
        self._serial += 1
        return b"@/%s%d" % (self.top.replace(b"/", b"-"), self._serial)

    def _move_out(self) -> list[Call]:
        entry = self._entry("file", "symlink", "fifo", "socket")
        if not entry or not self._may_leave(entry.node):
            return []
        path = self._beyond()
        self._detach(entry)
        if not entry.node.watched:
            entry.node.links += 1
            self._outside.append((path, entry.node))
        return [Call("rename", (entry.path, path))]

    def _may_leave(self, *nodes: Node) -> bool:
        """What is watched stays so natively where no mount reaches: it is then left alone."""
        if not any(node.watched for node in nodes):
            return True
        if any(self._is_held(node) or (node.kind != "dir" and node.links > 1) for node in nodes):
            return False
        return not self._spared(*nodes)

    def _move_in(self) -> list[Call]:
        target = self._entry("file", "symlink", "fifo", "socket")
        replace = target is not None and self._rng.random() < 0.3
        if self._full() or (replace and target and self._spared(target.node)):
            return []
        here = [item for item in self._outside if item[1].kind != "dir"]
        calls: list[Call] = []
        if here and self._rng.random() < 0.6:
            path, node = item = self._rng.choice(here)
            if replace and target and target.node is node:
                return []
            self._outside.remove(item)
            node.links -= 1
        else:
            path, node = self._beyond(), Node("file")
            calls += self._creation(path, self._size())
        if replace and target:
            directory, name = target[:2]
            self._detach(target)
        else:
            directory = self._directory()
            name = self._fresh(directory)
        self._attach(directory, name, node)
        return [*calls, Call("rename", (path, directory.path + name))]

    def _move_dir_out(self) -> list[Call]:
        entry = self._entry("dir")
        if not entry or not self._may_leave(*entry.node.tree()):
            return []
        path = self._beyond()
        lost = any(node.watched for node in entry.node.tree())
        old = self._drop(entry)
        if not lost:
            entry.node.links += 1
            self._outside.append((path, entry.node))
        return [Call("rename", (old, path))]

    def _move_dir_in(self) -> list[Call]:
        directory = self._directory()
        if len(self._nodes()) >= MAX_DIRECTORIES or directory.depth >= MAX_DEPTH - 1:
            return []
        here = [item for item in self._outside if item[1].kind == "dir"]
        calls: list[Call] = []
        if here and self._rng.random() < 0.6:
            path, node = item = self._rng.choice(here)
            node.parent = None
            if self._too_deep(node, directory):
                return []
            self._outside.remove(item)
            node.links -= 1
        else:
            path, node = self._beyond(), Node("dir")
            self._add(self._add(node, b"sub", "dir"), b"deep", "file")
            calls = [Call("mkdir", (path,)), Call("mkdir", (path + b"/sub",))]
            calls += self._creation(path + b"/sub/deep", 3)
        name = self._fresh(directory)
        self._attach(directory, name, node)
        return [*calls, Call("rename", (path, directory.path + name))]

    def _hold_open(self) -> list[Call]:
        entry = self._entry("file")
        if not entry or len(self._held) >= MAX_HELD:
            return []
        is_seen = entry.directory.watched or entry.node.watched
        if not is_seen or self._is_held(entry.node):
            return []  # README, "What does not": an OPEN before the first watch, merged OPENs
        self._serial += 1
        flags = self._rng.choice([os.O_WRONLY, os.O_RDWR, os.O_RDONLY])
        slot = 10 + self._serial
        self._held[slot] = Held(entry.node, slot, flags)
        # It is used at once, as programs do: else what others do with the file may be taken for
        # that, and their OPENs be merged with this one.
        return [
            *self._appending(entry.path),
            Call("open", (slot, entry.path, flags)),
            Call("read", (slot, 1)) if flags == os.O_RDONLY else Call("write", (slot, 1)),
        ]

    def _hold_use(self) -> list[Call]:
        if not self._held:
            return []
        held = self._rng.choice(list(self._held.values()))
        choices = [Call("write", (held.slot, self._size())), Call("read", (held.slot, 50))]
        if held.flags == os.O_RDWR:
            return [self._rng.choice([*choices, Call("ftruncate", (held.slot, 3))])]
        return [choices[held.flags == os.O_RDONLY]]

    def _hold_close(self) -> list[Call]:
        if not self._held:
            return []
        slot = self._rng.choice(list(self._held))
        del self._held[slot]
        return [Call("close", (slot,))]

    def _two_writers(self) -> list[Call]:
        entry = self._entry("file")
        if not entry or self._is_held(entry.node):  # its two OPENs are merged, as above
            return []
        first, second = self._rng.sample([0, 1], 2)
        return [
            Call("open", (0, entry.path, os.O_WRONLY)),
            Call("open", (1, entry.path, os.O_WRONLY)),
            Call("write", (first, 10)),
            Call("write", (second, 10)),
            Call("close", (first,)),
            Call("write", (second, 10)),
            Call("close", (second,)),
        ]

    def _flash(self) -> list[Call]:
        """A file that lives for less than a millisecond, or a directory."""
        directory = self._directory()
        path = directory.path + self._fresh(directory)
        if self._rng.random() < 0.2:
            return [Call("mkdir", (path,)), Call("rmdir", (path,))]
        calls = self._creation(path, self._size())
        if self._rng.random() < 0.3:
            other = self._directory()
            name = self._fresh(other)
            if other.path + name != path:
                calls.append(Call("rename", (path, path := other.path + name)))
        return [*calls, Call("unlink", (path,))]

    def _recreate(self) -> list[Call]:
        entry = self._entry("file", "symlink", "fifo", "socket")
        if not entry or self._spared(entry.node):
            return []
        self._detach(entry)
        self._add(entry.directory, entry.name, "file")
        size = self._rng.choice([0, 10])
        return [Call("unlink", (entry.path,)), *self._creation(entry.path, size)]

    def _replace_kind(self) -> list[Call]:
        """The same name, but a directory where a file was, or the other way round."""
        empty = [entry for entry in self._entries("dir") if not entry.node.children]
        if empty and self._rng.random() < 0.5:
            entry = self._rng.choice(empty)
            if self._spared(entry.node):
                return []
            self._detach(entry)
            self._add(entry.directory, entry.name, "file")
            return [Call("rmdir", (entry.path,)), *self._creation(entry.path)]
        file = self._entry("file")
        if not file or self._spared(file.node):
            return []
        if len(self._nodes()) >= MAX_DIRECTORIES or file.directory.depth >= MAX_DEPTH:
            return []
        self._detach(file)
        self._add(file.directory, file.name, "dir")
        return [Call("unlink", (file.path,)), Call("mkdir", (file.path,))]


def main() -> None:
    """Do one writer's steps without a pause: the second of two concurrent writers is a process."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("outside", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--ops", type=int, required=True)
    parser.add_argument("--top", required=True)
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--without", default="")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    generator = Generator(
        args.seed,
        args.files,
        args.top.encode(),
        frozenset(filter(None, args.without.split(","))),
        frozenset(filter(None, args.only.split(","))),
    )
    steps = generator.plan(args.ops).steps
    executor = Executor(args.root, args.outside)
    print("READY", flush=True)
    input()
    for step in steps:
        executor.run(step.calls)
    executor.close()
    if unexpected := executor.unexpected():
        raise SystemExit("\n".join(unexpected))


if __name__ == "__main__":
    main()

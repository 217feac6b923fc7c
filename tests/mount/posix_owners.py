"""POSIX cases on users: owners of new files, permissions, set-id bits. All but a few need root to
become somebody else.
"""

import errno
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from tests.mount.posix_support import (
    ALICE,
    BOB,
    PROJECT,
    UTIME_NOW,
    User,
    case,
    fails,
    in_child,
    list_all,
    mkdir,
    mode_of,
    opened,
    utimensat,
    write,
)


def _owned(path: Path, uid: int, gid: int, mode: int) -> Path:
    """Give a file or directory its owner, then its mode (chown clears set-id bits)."""
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


def _denied(function: Callable[[], object], code: int = errno.EACCES) -> None:
    with fails(code):
        function()


# -- the owner of what is made --------------------------------------------------------------------


def _make_all(d: Path) -> list[Path]:
    write(d / "f")
    mkdir(d / "sub")
    os.mkfifo(d / "p")
    (d / "s").symlink_to("x")
    os.mknod(d / "n", stat.S_IFREG | 0o600)
    return [d / name for name in ("f", "sub", "p", "s", "n")]


@case()
def owner_is_the_caller(d: Path) -> None:
    for path in _make_all(d):
        found = path.lstat()
        assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid()), path.name


@case(root=True)
def owner_of_each_user(d: Path) -> None:
    d.chmod(0o777)
    for user in (ALICE, BOB, User(ALICE.uid, PROJECT)):
        sub = d / f"{user.uid}-{user.gid}"

        def make(sub: Path = sub) -> None:
            _make_all(mkdir(sub))

        in_child(make, user)
        for path in (sub, *sub.iterdir()):
            found = path.lstat()
            assert (found.st_uid, found.st_gid) == (user.uid, user.gid), path.name


@case(root=True)
def owner_by_effective_ids(d: Path) -> None:
    """The file system ids are what counts: effective, not real ones."""
    d.chmod(0o777)

    def half() -> None:
        os.setgroups([])
        os.setresgid(BOB.gid, ALICE.gid, BOB.gid)
        os.setresuid(BOB.uid, ALICE.uid, BOB.uid)
        write(d / "f")

    in_child(half)
    assert ((d / "f").stat().st_uid, (d / "f").stat().st_gid) == (ALICE.uid, ALICE.gid)


@case(root=True)
def sgid_directory_passes_its_group_on(d: Path) -> None:
    shared = _owned(mkdir(d / "shared"), 0, PROJECT, 0o2777)

    def make() -> None:
        os.umask(0)
        _make_all(shared)
        os.close(os.open(shared / "x", os.O_CREAT | os.O_WRONLY, 0o2755))

    for user in (ALICE, BOB):
        in_child(make, user)
        for name in ("f", "p", "s", "n", "x", "sub"):
            found = (shared / name).lstat()
            assert (found.st_uid, found.st_gid) == (user.uid, PROJECT), name
        assert mode_of(shared / "sub") == 0o2777
        assert mode_of(shared / "f") == 0o666
        # the set-gid bit of a new executable stays for a member only
        assert mode_of(shared / "x") == (0o2755 if PROJECT in user.groups else 0o755)
        for path in shared.iterdir():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


# -- chmod and chown -------------------------------------------------------------------------------


@case(root=True)
def chown_as_root(d: Path) -> None:
    f = write(d / "f")
    (d / "s").symlink_to("f")
    os.chown(f, ALICE.uid, -1)
    os.chown(f, -1, PROJECT)
    os.lchown(d / "s", BOB.uid, BOB.gid)
    assert (f.stat().st_uid, f.stat().st_gid) == (ALICE.uid, PROJECT)
    assert ((d / "s").lstat().st_uid, (d / "s").lstat().st_gid) == (BOB.uid, BOB.gid)
    os.chown(d / "s", 0, 4_000_000_000)
    assert (f.stat().st_uid, f.stat().st_gid) == (0, 4_000_000_000)


@case(root=True)
def chown_by_ordinary_users(d: Path) -> None:
    f = _owned(write(d / "f"), ALICE.uid, ALICE.gid, 0o666)

    def owner() -> None:
        os.chown(f, -1, PROJECT)  # a supplementary group of hers
        os.chown(f, ALICE.uid, ALICE.gid)
        _denied(lambda: os.chown(f, -1, BOB.gid), errno.EPERM)
        _denied(lambda: os.chown(f, BOB.uid, -1), errno.EPERM)
        f.chmod(0o640)
        f.chmod(0o666)

    def stranger() -> None:
        _denied(lambda: os.chown(f, BOB.uid, -1), errno.EPERM)
        _denied(lambda: os.chown(f, -1, BOB.gid), errno.EPERM)
        _denied(lambda: f.chmod(0o777), errno.EPERM)
        _denied(lambda: os.utime(f, (1, 1)), errno.EPERM)
        _denied(lambda: os.setxattr(f, "trusted.k", b"v"), errno.EPERM)
        os.setxattr(f, "user.k", b"v")  # write permission is enough
        os.utime(f)
        utimensat(f, UTIME_NOW, UTIME_NOW)
        with fails(errno.EPERM):
            os.open(f, os.O_RDONLY | os.O_NOATIME)

    in_child(owner, ALICE)
    in_child(stranger, BOB)
    assert (f.stat().st_uid, f.stat().st_gid, mode_of(f)) == (ALICE.uid, ALICE.gid, 0o666)


@case(root=True)
def chmod_sgid_by_a_non_member(d: Path) -> None:
    f = _owned(write(d / "f"), ALICE.uid, BOB.gid, 0o755)
    g = _owned(write(d / "g"), ALICE.uid, PROJECT, 0o755)

    def set_it() -> None:
        f.chmod(0o6755)
        g.chmod(0o6755)
        assert mode_of(f) == 0o4755
        assert mode_of(g) == 0o6755

    in_child(set_it, ALICE)


@case(root=True)
def chown_clears_set_id_bits(d: Path) -> None:
    f = _owned(write(d / "f"), ALICE.uid, ALICE.gid, 0o6755)
    in_child(lambda: os.chown(f, -1, PROJECT), ALICE)
    assert mode_of(f) == 0o755
    _owned(f, ALICE.uid, ALICE.gid, 0o6755)
    os.chown(f, BOB.uid, -1)  # on Linux by root too
    assert mode_of(f) == 0o755
    sub = _owned(mkdir(d / "sub"), ALICE.uid, ALICE.gid, 0o2755)
    os.chown(sub, BOB.uid, PROJECT)
    assert mode_of(sub) == 0o2755  # a directory keeps them


@case(root=True)
def writing_clears_set_id_bits(d: Path) -> None:
    f = write(d / "f", b"data")

    def append() -> None:
        with opened(f, os.O_WRONLY | os.O_APPEND) as fd:
            os.write(fd, b"x")

    def cut() -> None:
        with opened(f, os.O_WRONLY) as fd:
            os.ftruncate(fd, 1)

    steps: tuple[Callable[[], object], ...] = (
        append,
        cut,
        lambda: os.truncate(f, 2),
        lambda: f.write_bytes(b"again"),
    )
    for user in (ALICE, BOB):  # the owner, and a user that may only write
        for i, step in enumerate(steps):
            _owned(f, ALICE.uid, ALICE.gid, 0o6777)
            in_child(step, user)
            assert mode_of(f) == 0o777, f"step {i} by {user.uid}: {mode_of(f):o}"
    _owned(f, ALICE.uid, ALICE.gid, 0o6777)
    append()
    assert mode_of(f) == 0o6777  # root keeps them


@case(root=True)
def writing_clears_file_capabilities(d: Path) -> None:
    f = write(d / "f", b"data", 0o755)
    cap_net_bind = struct.pack("<5I", 0x02000000, 1 << 10, 0, 0, 0)
    os.setxattr(f, "security.capability", cap_net_bind)
    assert os.getxattr(f, "security.capability") == cap_net_bind
    write(f, b"other")
    with fails(errno.ENODATA):
        os.getxattr(f, "security.capability")


# -- permissions -----------------------------------------------------------------------------------


@case(root=True)
def permission_of_files(d: Path) -> None:
    f = _owned(write(d / "f", b"data"), ALICE.uid, PROJECT, 0o640)
    outsider = User(54329, 54329)
    member = User(54328, 54328, (PROJECT,))

    def reads() -> None:
        assert f.read_bytes() == b"data"
        _denied(lambda: os.open(f, os.O_WRONLY))
        _denied(lambda: os.open(f, os.O_RDWR))
        _denied(lambda: os.truncate(f, 0))
        _denied(lambda: os.utime(f))
        _denied(lambda: os.setxattr(f, "user.k", b"v"))

    def nothing() -> None:
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
            with fails(errno.EACCES):
                os.open(f, flags)
        _denied(lambda: os.getxattr(f, "user.none"))
        f.stat()

    in_child(lambda: f.write_bytes(b"data"), ALICE)
    in_child(reads, User(54328, PROJECT))
    in_child(reads, member)  # by a supplementary group
    in_child(nothing, outsider)
    in_child(nothing, BOB)
    f.chmod(0o004)
    in_child(nothing, ALICE)  # the owner's bits count, not the others'
    in_child(nothing, member)
    in_child(reads, outsider)
    assert f.read_bytes() == b"data"  # root may
    with opened(f, os.O_RDWR) as fd:
        os.write(fd, b"root")


@case(root=True)
def permission_of_directories(d: Path) -> None:
    sub = _owned(mkdir(d / "sub"), ALICE.uid, ALICE.gid, 0o755)
    for name in ("f", "g"):
        _owned(write(sub / name), ALICE.uid, ALICE.gid, 0o666)
    mkdir(sub / "empty")
    outside = _owned(mkdir(d / "outside"), BOB.uid, BOB.gid, 0o755)
    _owned(write(outside / "mine"), BOB.uid, BOB.gid, 0o644)

    def may_not_change() -> None:
        _denied(lambda: (sub / "new").mkdir())
        _denied(lambda: write(sub / "new"))
        _denied(lambda: os.mkfifo(sub / "new"))
        _denied(lambda: (sub / "new").symlink_to("x"))
        _denied(lambda: os.link(outside / "mine", sub / "new"))
        _denied((sub / "f").unlink)
        _denied((sub / "empty").rmdir)
        _denied(lambda: (sub / "f").rename(sub / "h"))
        _denied(lambda: (sub / "f").rename(outside / "h"))
        _denied(lambda: (outside / "mine").rename(sub / "h"))

    def may_not_search() -> None:
        _denied((sub / "f").stat)
        _denied((sub / "none").stat)
        _denied(lambda: os.open(sub / "f", os.O_RDONLY))
        _denied(lambda: os.chdir(sub))

    def may_not_list() -> None:
        _denied(lambda: os.listdir(sub))

    in_child(may_not_change, BOB)
    in_child(lambda: (sub / "f").write_bytes(b"x"), BOB)
    sub.chmod(0o766)
    in_child(may_not_search, BOB)

    def names_only() -> None:
        with opened(sub) as fd:
            assert len(list_all(fd)) == 3

    in_child(names_only, BOB)
    sub.chmod(0o711)
    in_child(may_not_list, BOB)
    in_child(lambda: (sub / "f").read_bytes(), BOB)
    sub.chmod(0o700)
    in_child(may_not_search, BOB)
    in_child(may_not_list, BOB)
    sub.chmod(0)
    in_child(may_not_search, ALICE)
    assert sorted(os.listdir(sub)) == ["empty", "f", "g"]  # root may


@case(root=True)
def permission_is_checked_again(d: Path) -> None:
    """What a user saw while it was allowed must not be answered from a cache afterwards."""
    sub = _owned(mkdir(d / "sub"), 0, 0, 0o755)
    write(sub / "f", b"secret", 0o644)

    def read() -> None:
        assert (sub / "f").read_bytes() == b"secret"
        assert os.listdir(sub) == ["f"]

    def denied() -> None:
        _denied((sub / "f").stat)
        _denied((sub / "f").read_bytes)
        _denied(lambda: os.listdir(sub))

    in_child(read, BOB)
    sub.chmod(0o700)
    in_child(denied, BOB)
    sub.chmod(0o755)
    in_child(read, BOB)
    (sub / "f").chmod(0o600)
    in_child(lambda: _denied((sub / "f").read_bytes), BOB)


@case(root=True)
def permission_in_sticky_directories(d: Path) -> None:
    sub = _owned(mkdir(d / "sub"), 0, 0, 0o1777)
    _owned(write(sub / "hers"), ALICE.uid, ALICE.gid, 0o666)
    _owned(mkdir(sub / "dir"), ALICE.uid, ALICE.gid, 0o777)

    def stranger() -> None:
        write(sub / "his")
        _denied((sub / "hers").unlink, errno.EPERM)
        _denied((sub / "dir").rmdir, errno.EPERM)
        _denied(lambda: (sub / "hers").rename(sub / "x"), errno.EPERM)
        _denied(lambda: (sub / "his").rename(sub / "hers"), errno.EPERM)
        (sub / "his").rename(sub / "his2")
        (sub / "his2").unlink()

    def owner() -> None:
        (sub / "hers").rename(sub / "hers2")
        (sub / "hers2").unlink()
        (sub / "dir").rmdir()

    in_child(stranger, BOB)
    in_child(owner, ALICE)


@case(root=True)
def permission_to_remove_what_others_own(d: Path) -> None:
    sub = _owned(mkdir(d / "sub"), ALICE.uid, ALICE.gid, 0o755)
    _owned(write(sub / "f"), 0, 0, 0o600)
    in_child((sub / "f").unlink, ALICE)
    assert os.listdir(sub) == []


@case(root=True)
def permission_to_execute(d: Path) -> None:
    f = write(d / "f", b"#!/bin/sh\nexit 0\n", 0o644)

    def run() -> None:
        pid = os.posix_spawn(f, [str(f)], {})
        assert os.waitpid(pid, 0)[1] == 0

    _denied(run)
    f.chmod(0o754)
    run()
    in_child(lambda: _denied(run), BOB)
    f.chmod(0o755)
    in_child(run, BOB)


@case(root=True)
def access_uses_real_ids(d: Path) -> None:
    f = write(d / "f", mode=0o640)
    assert os.access(f, os.R_OK | os.W_OK)
    assert not os.access(f, os.X_OK)
    assert not os.access(d / "none", os.F_OK)

    def half_root() -> None:
        os.setgroups([])
        os.setresgid(BOB.gid, 0, 0)
        os.setresuid(BOB.uid, 0, 0)
        assert os.access(f, os.F_OK)
        assert not os.access(f, os.R_OK)
        assert not os.access(f, os.W_OK)
        assert os.access(f, os.R_OK | os.W_OK, effective_ids=True)

    def ordinary() -> None:
        assert not os.access(f, os.R_OK)
        assert os.access(d, os.R_OK | os.X_OK)
        assert not os.access(d, os.W_OK)

    in_child(half_root)
    in_child(ordinary, BOB)


@case(root=True)
def groups_are_read_at_each_call(d: Path) -> None:
    """A process that drops a supplementary group loses what the group gave."""
    f = _owned(write(d / "f", b"data"), 0, PROJECT, 0o640)

    def drop() -> None:
        os.setgroups([PROJECT])
        os.setresgid(ALICE.gid, ALICE.gid, 0)
        os.seteuid(ALICE.uid)
        assert f.read_bytes() == b"data"
        os.seteuid(0)
        os.setgroups([])
        os.seteuid(ALICE.uid)
        _denied(f.read_bytes)

    in_child(drop)


@case(root=True)
def descriptors_outlive_privileges(d: Path) -> None:
    """What a descriptor may do was settled when it was opened; names are looked up anew."""
    sub = mkdir(d / "sub", 0o700)
    write(sub / "f", b"data", 0o600)

    def drop() -> None:
        os.chdir(sub)
        with opened(sub / "f", os.O_RDWR) as fd, opened(sub) as directory:
            BOB.become()
            assert os.pread(fd, 10, 0) == b"data"
            assert os.pwrite(fd, b"DATA!", 0) == 5
            os.ftruncate(fd, 4)
            os.fsync(fd)
            assert os.fstat(fd).st_size == 4
            assert [entry.name for entry in list_all(directory)] == [b"f"]
            with fails(errno.EPERM):
                os.fchmod(fd, 0o666)
            with fails(errno.EPERM):
                os.utime(fd, ns=(1, 1))
            with fails(errno.EACCES):
                os.stat("f")
            with fails(errno.EACCES):
                os.open("f", os.O_RDONLY, dir_fd=directory)
            with fails(errno.EACCES):
                os.open(f"/proc/self/fd/{fd}", os.O_RDWR)

    in_child(drop)
    assert (sub / "f").read_bytes() == b"DATA"


# -- access control lists --------------------------------------------------------------------------


def _acl(*entries: tuple[int, int, int]) -> bytes:
    """The kernel's form: version 2, then tag, permissions, id of each entry."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


_NOBODY = 0xFFFFFFFF
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 1, 2, 4, 0x10, 0x20


@case(root=True)
def acl_grants_and_denies(d: Path) -> None:
    f = write(d / "f", b"data", 0o600)
    os.setxattr(
        f,
        "system.posix_acl_access",
        _acl(
            (_USER_OBJ, 6, _NOBODY),
            (_USER, 4, ALICE.uid),
            (_GROUP_OBJ, 0, _NOBODY),
            (_MASK, 4, _NOBODY),
            (_OTHER, 0, _NOBODY),
        ),
    )
    assert mode_of(f) == 0o640  # the group bits show the mask

    def alice() -> None:
        assert f.read_bytes() == b"data"
        _denied(lambda: os.open(f, os.O_WRONLY))

    in_child(alice, ALICE)
    in_child(lambda: _denied(f.read_bytes), BOB)
    f.chmod(0o600)  # a chmod of the group bits changes the mask
    in_child(lambda: _denied(f.read_bytes), ALICE)


@case(root=True)
def acl_default_is_inherited(d: Path) -> None:
    sub = mkdir(d / "sub", 0o755)
    default = _acl(
        (_USER_OBJ, 7, _NOBODY),
        (_USER, 7, ALICE.uid),
        (_GROUP_OBJ, 5, _NOBODY),
        (_MASK, 7, _NOBODY),
        (_OTHER, 0, _NOBODY),
    )
    os.setxattr(sub, "system.posix_acl_default", default)
    mkdir(sub / "dir")
    assert os.getxattr(sub / "dir", "system.posix_acl_default") == default
    os.close(os.open(sub / "f", os.O_CREAT | os.O_WRONLY, 0o666))
    assert len(os.getxattr(sub / "f", "system.posix_acl_access")) == len(default)
    assert mode_of(sub / "f") & 0o007 == 0


@case(root=True)
def acl_default_replaces_the_umask(d: Path) -> None:
    sub = mkdir(d / "sub", 0o755)
    open_to_all = _acl((_USER_OBJ, 7, _NOBODY), (_GROUP_OBJ, 7, _NOBODY), (_OTHER, 7, _NOBODY))
    os.setxattr(sub, "system.posix_acl_default", open_to_all)

    def make() -> None:
        os.umask(0o77)
        os.close(os.open(sub / "f", os.O_CREAT | os.O_WRONLY, 0o666))

    in_child(make)
    assert mode_of(sub / "f") == 0o666

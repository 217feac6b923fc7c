"""A mount of an ordinary user's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from harness.mounts import wait_until
from harness.namespace import UID, as_user, inside, run
from harness.usersmount import users_mount
from tests.cli.support import GUEST, background, line_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, which only root can")


def test_an_ordinary_users_mount(tmp_path: Path) -> None:
    with users_mount(tmp_path) as (share, _):
        process = share.process
        said = line_of(process, stderr=True)
        assert said.startswith("fsd: not root: ")
        user = inside(process.pid, *as_user())
        kinds = "create,modify,close_write,move,delete"
        with background(*user, "inotifywait", "-mq", "-e", kinds, share.mountpoint) as watcher:

            def armed() -> bool:
                done = run([*user, str(GUEST), "marks", str(share.mountpoint), "--json"])
                assert done.returncode == 0, done.stderr
                return any(row["armed"] for row in json.loads(done.stdout))

            wait_until(armed, 20, "the armed mark")
            (share.source / "made").mkdir()
            assert line_of(watcher) == f"{share.mountpoint}/ CREATE,ISDIR made"
            (share.source / "text").write_text("x")
            assert [line_of(watcher).split()[1:] for _ in range(3)] == [
                ["CREATE", "text"], ["MODIFY", "text"], ["CLOSE_WRITE,CLOSE", "text"],
            ]  # fmt: skip
            (share.source / "text").rename(share.source / "new")
            (share.source / "new").unlink()
            assert [line_of(watcher).split()[1:] for _ in range(3)] == [
                ["MOVED_FROM", "text"], ["MOVED_TO", "new"], ["DELETE", "new"],
            ]  # fmt: skip
        made = run([*user, "sh", "-c", f"echo y > {share.mountpoint}/own; id -u"])
        assert (made.returncode, made.stdout) == (0, f"{UID}\n")
        assert (share.source / "own").stat().st_uid == UID
        process.terminate()
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""  # what is reduced was said once


def test_an_ordinary_users_mount_without_an_agent(tmp_path: Path) -> None:
    """The counterpart: nothing arrives."""
    with users_mount(tmp_path, "--no-agent") as (share, _):
        user = inside(share.process.pid, *as_user())
        with background(*user, "inotifywait", "-m", share.mountpoint) as watcher:
            while "established" not in line_of(watcher, stderr=True):
                pass
            (share.source / "host").mkdir()
            run([*user, "mkdir", share.mountpoint / "own"])
            assert line_of(watcher) == f"{share.mountpoint}/ CREATE,ISDIR own"


def test_an_ordinary_users_removed_working_directory(tmp_path: Path) -> None:
    with users_mount(tmp_path) as (share, _):
        user = inside(share.process.pid, *as_user())
        script = "mkdir d && cd d && rmdir ../d && ls -a . && stat -c %h . && getfacl -c ."
        done = run([*user, "sh", "-c", f"cd {share.mountpoint} && {script}"])
        assert (done.returncode, done.stdout.split()[0]) == (0, "0"), done


def test_an_ordinary_user_unmounts(tmp_path: Path) -> None:
    with users_mount(tmp_path) as (share, _):
        user = inside(share.process.pid, *as_user())
        done = run([*user, "fusermount3", "-u", "-z", share.mountpoint])
        assert done.returncode == 0, done.stderr
        assert share.process.wait(20) == 0


def test_an_ordinary_users_mount_for_all_is_not_all_theirs(tmp_path: Path) -> None:
    """The server does for others what its own user may; the kernel checks what they may."""
    conf = tmp_path / "fuse.conf"
    conf.write_text("user_allow_other\n")
    conf.chmod(0o644)
    for_all = f"mount --bind {conf} /etc/fuse.conf"
    with users_mount(tmp_path, "--allow-other", "--no-agent", setup=for_all) as (share, _):
        other = inside(share.process.pid, *as_user(UID - 1))
        owner = inside(share.process.pid, *as_user())
        for name, mode in (("diary", 0o600), ("board", 0o644), ("listed", 0o644)):
            (share.source / name).write_text("its text")
            os.chown(share.source / name, UID, UID)
            (share.source / name).chmod(mode)
        acl = f"u:{UID - 1}:-"
        done = run([*owner, "setfacl", "-m", acl, share.mountpoint / "listed"])
        assert done.returncode == 0, done.stderr
        for name, sees in (("diary", False), ("board", True), ("listed", False)):
            done = run([*other, "cat", share.mountpoint / name])
            assert (done.stdout == "its text") is sees, done
            done = run([*other, "sh", "-c", f"echo x >> {share.mountpoint / name}"])
            assert done.returncode, name
            assert run([*other, "chmod", "777", share.mountpoint / name]).returncode, name
            assert run([*owner, "cat", share.mountpoint / name]).stdout == "its text"
        assert "No such file" in run([*other, "ls", share.mountpoint / ".fsd"]).stderr
        share.source.chmod(0o777)
        make = (
            "import os; os.close(os.open('tool', os.O_CREAT, 0o6777)); os.mknod('node', 0o106777)"
        )
        done = run([*other, "sh", "-c", f'cd {share.mountpoint} && python3 -c "{make}"'])
        assert done.returncode == 0, done.stderr
        for name in ("tool", "node"):  # the server's user owns what it makes
            made = (share.source / name).stat()
            assert (made.st_uid, made.st_mode & 0o7000) == (UID, 0)


def test_names_that_cannot_be_looked_at_are_listed(tmp_path: Path) -> None:
    """In a directory that may be read and not entered, as natively."""
    with users_mount(tmp_path, "--no-agent") as (share, _):
        (share.source / "d").mkdir()
        for name in ("file", "other"):
            (share.source / "d" / name).touch()
        (share.source / "d/directory").mkdir()
        for path in (share.source / "d", share.source / "d/directory"):
            os.chown(path, UID, UID)
        (share.source / "d").chmod(0o444)
        assert share.process is not None
        user = inside(share.process.pid, *as_user())
        done = run([*user, "ls", "-1", f"{share.mountpoint}/d"])
        assert done.stdout.split() == ["directory", "file", "other"], done.stderr
        looked = run([*user, "stat", f"{share.mountpoint}/d/file"])
        assert "Permission denied" in looked.stderr
        (share.source / "d").chmod(0o755)
        assert f" {UID} " in run([*user, "ls", "-ln", f"{share.mountpoint}/d"]).stdout


def output(tmp_path: Path, script: str) -> str:
    """Of a Python program that a user runs with a source and the mount of it."""
    with users_mount(tmp_path) as (share, _):
        user = inside(share.process.pid, *as_user())
        done = run([*user, "python3", "-c", script, str(share.source), str(share.mountpoint)])
        assert not done.stderr
        return done.stdout


HELD = """
import os, sys
source, mountpoint = sys.argv[1:]
def held(name):
    return os.open(os.path.join(mountpoint, name), os.O_PATH)
def read(fd):
    with open(f"/proc/self/fd/{fd}") as file:
        return file.read()
os.chdir(source)
open("a", "w").write("data")
os.link("a", "b")
fd, _ = held("a"), held("b")
os.unlink("b")
assert (os.fstat(fd).st_nlink, os.fstat(fd).st_size) == (1, 4), os.fstat(fd)
assert read(fd) == "data"
os.rename("a", "c")
assert (os.fstat(fd).st_nlink, os.fstat(fd).st_size) == (1, 4), os.fstat(fd)
assert read(fd) == "data"
print("done")
"""
"""What the host does with names does not end what a program of the mount holds."""


def test_names_that_go_under_a_held_file(tmp_path: Path) -> None:
    assert output(tmp_path, HELD) == "done\n"


MOVED = """
import os, sys
source, mountpoint = sys.argv[1:]
os.chdir(source)
os.mkdir("other")
os.mkdir("unseen")
def check(name, *moves):
    for _ in range(4):
        open("before", "w").close()  # the server is still busy with that
    with open(name, "w") as file:
        file.write("data")
    fd = os.open(os.path.join(mountpoint, name), os.O_PATH)
    for old, new in zip((name, *moves), moves):
        os.rename(old, new)
    assert os.fstat(fd).st_nlink == 1, (name, os.fstat(fd))
    with open(f"/proc/self/fd/{fd}") as file:
        assert file.read() == "data", name
    os.close(fd)
for i in range(12):
    os.listdir(os.path.join(mountpoint, "other"))
    check(f"plain{i}", f"new{i}")
    check(f"over{i}", f"new{i}")
    check(f"chain{i}", "1", "2", "3")
    check(f"into{i}", f"other/{i}")
    open("away", "w").close()
    os.rename("away", "unseen/away")  # whose other half the server waits for in vain
    check(f"behind{i}", f"new{i}")
print("done")
"""
"""The host moves what a program of the mount has just begun to hold."""


def test_a_held_file_that_the_host_moves_at_once(tmp_path: Path) -> None:
    assert output(tmp_path, MOVED) == "done\n"


FAR = """
import os, sys
source, mountpoint = sys.argv[1:]
os.chdir(source)
os.mkdir("unseen")
open("file", "w").close()
fd = os.open(os.path.join(mountpoint, "file"), os.O_PATH)
os.rename("file", "unseen/file")
try:
    print(os.fstat(fd).st_nlink)
except OSError as error:
    print(error.strerror)
os.listdir(os.path.join(mountpoint, "unseen"))
os.stat(os.path.join(mountpoint, "unseen/file"))
print(os.fstat(fd).st_nlink)
"""


def test_a_held_file_that_is_moved_where_nobody_looked(tmp_path: Path) -> None:
    """It seems to be removed, until it is looked up where it is."""
    before, after = output(tmp_path, FAR).splitlines()
    assert before in ("0", "Stale file handle", "No such file or directory")
    assert after == "1"

"""Watchers of our own mount: handles of type 0x81, and the agent that learns of restored marks."""

from __future__ import annotations

import os
from pathlib import Path

from harness.mounts import Mount, wait_until

from .remote import remote, restored, save, shown

CREATE, MODIFY = 0x100, 0x2


def test_watches_on_our_mount(share: Mount, tmp_path: Path) -> None:
    (share.source / "directory").mkdir()
    (share.source / "file").touch()
    mounted = [share.mountpoint / "directory", share.mountpoint / "file"]
    with remote() as watcher:
        watcher("inotify(3)")
        watcher(f"watch(3, {str(mounted[0])!r}, {CREATE}, 7)")
        watcher(f"watch(3, {str(mounted[1])!r}, {MODIFY}, 5000)")
        before = watcher.marks(3)
        save(watcher, tmp_path / "saved")
    for row in (state := shown(tmp_path / "saved"))["files"][0]["watches"]:
        assert (row["handle"]["type"], row["handle"]["kind"]) == (0x81, "decodable")
        assert Path(row["path"]) in mounted
    assert [row["type"] for row in state["filesystems"]] == ["fuse.fsd"]
    with restored(tmp_path / "saved") as again:
        assert again.marks(3) == before
        share.wait_armed(*mounted, pid=again.pid, timeout=5)
        (share.source / "directory" / "new").touch()
        assert again("events(3)") == [[7, CREATE, 0, "new"]]
        (share.source / "file").write_text("changed")
        assert [5000, MODIFY, 0, ""] in again("events(3)")


def test_a_file_that_is_another_one_by_now(share_no_agent: Mount, tmp_path: Path) -> None:
    share = share_no_agent
    path = share.mountpoint / "file"
    (share.source / "file").touch()
    with remote() as watcher:
        watcher("inotify(3)")
        watcher(f"watch(3, {str(path)!r}, {MODIFY})")
        save(watcher, tmp_path / "saved")
    (share.source / "other").touch()
    os.rename(share.source / "other", share.source / "file")
    wait_until(lambda: path.stat().st_ino == (share.source / "file").stat().st_ino)
    with restored(tmp_path / "saved") as again:
        assert again.marks(3) == []
        assert f"watch 1 on {path}" in again.stderr

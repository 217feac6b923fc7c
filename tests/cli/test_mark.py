"""`fsd-guest mark`: interest by hand."""

from __future__ import annotations

import os

import pytest

from harness.mounts import Mount, wait_until
from harness.namespace import run
from tests.cli.support import GUEST, mark, refused, status_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, which only root can")


def by_hand(share: Mount) -> dict[str, list[str]]:
    guests = status_of(share.mountpoint)["guests"]
    hand = [guest for guest in guests if guest["kind"] == "by hand"]
    return {mark["path"]: mark["mask"] for guest in hand for mark in guest["armed"]}


def test_mark_add_modify_remove(share_no_agent: Mount) -> None:
    share = share_no_agent
    (share.source / "dir").mkdir()
    path = share.mountpoint / "dir"
    number = os.stat(path).st_ino
    assert mark("add", path, "--mask", "create") == f"{path} (nodeid {number}): IN_CREATE\n"
    assert by_hand(share) == {"dir": ["create"]}
    assert mark("add", path, "--mask", "delete,IN_MODIFY").endswith(
        ": IN_MODIFY|IN_CREATE|IN_DELETE\n"
    )
    assert by_hand(share) == {"dir": ["modify", "create", "delete"]}
    mark("modify", path, "--mask", "attrib")
    assert by_hand(share) == {"dir": ["attrib"]}
    (share.source / "dir").chmod(0o700)
    wait_until(
        lambda: _counted(share) == {"attrib": {"forwarded": 1, "replayed": 1}},
        5,
        "the counted event",
    )
    assert mark("remove", path).endswith(": 0\n")
    assert by_hand(share) == {}
    assert status_of(share.mountpoint)["host_watches"] == 0


def _counted(share: Mount) -> dict[str, dict[str, int]]:
    guests = status_of(share.mountpoint)["guests"]
    kinds: dict[str, dict[str, int]] = next(g for g in guests if g["kind"] == "by hand")["by_kind"]
    return kinds


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["add", "--mask", "isdir"], "Invalid argument"),
        (["add", "--mask", "oneshot|ignored"], "Invalid argument"),
        (["add", "--mask", "bogus"], "unknown event 'bogus'"),
        (["add", "--mask", ""], "--mask"),
        (["add"], "--mask is missing"),
        (["modify", "--mask", "create"], "no mark was set by hand"),
        (["remove"], "no mark was set by hand"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mark_refused(share_no_agent: Mount, arguments: list[str], says: str) -> None:
    action, *rest = arguments
    done = run([GUEST, "mark", action, share_no_agent.mountpoint, *rest])
    refused(done, says, who="fsd-guest")
    assert by_hand(share_no_agent) == {}


def test_mark_of_a_missing_path(share_no_agent: Mount) -> None:
    missing = share_no_agent.mountpoint / "missing"
    refused(run([GUEST, "mark", "add", missing, "--mask", "all"]), "No such file", who="fsd-guest")

"""fs.inotify.max_queued_events, which is the whole machine's, is itself again after each server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fsd.linux.queuelimit import LIMIT, NOTE, limited_to

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can set the limit")

HOLD = """
import sys
from fsd.linux.queuelimit import limited_to
with limited_to(int(sys.argv[1])):
    print("set", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def usual() -> Iterator[int]:
    """The machine's own limit, which the test changes by a few."""
    before = int(LIMIT.read_text())
    yield before
    assert int(LIMIT.read_text()) == before, "another limit was left behind"


def holder(length: int) -> subprocess.Popen[bytes]:
    """A process that has just set the limit."""
    line = [sys.executable, "-c", HOLD, str(length)]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def hear(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == b"set\n"


def test_it_is_put_back(usual: int) -> None:
    with limited_to(usual + 1):
        assert int(LIMIT.read_text()) == usual + 1
    assert int(LIMIT.read_text()) == usual
    with pytest.raises(OSError, match="sysctl"), limited_to(1 << 40):
        pytest.fail("no kernel takes that")


def test_two_servers_take_turns(usual: int) -> None:
    """Else the second one would put back what the first one had set."""
    with holder(usual + 1) as first:
        hear(first)
        with holder(usual + 2) as second:
            assert first.stdin is not None
            assert int(LIMIT.read_text()) == usual + 1
            first.stdin.close()
            hear(second)
            assert int(LIMIT.read_text()) == usual + 2
            assert second.stdin is not None
            second.stdin.close()
    assert (first.returncode, second.returncode) == (0, 0)


@pytest.mark.parametrize("longer", [None, 2])
def test_after_a_kill_the_next_server_puts_it_back(usual: int, longer: int | None) -> None:
    with holder(usual + 1) as process:
        hear(process)
        process.send_signal(signal.SIGKILL)
    assert int(LIMIT.read_text()) == usual + 1
    with limited_to(None if longer is None else usual + longer):
        assert int(LIMIT.read_text()) == usual + (longer or 0)
    assert NOTE.read_text() == ""


def test_what_an_administrator_has_set_since_stays(usual: int) -> None:
    with holder(usual + 1) as process:
        hear(process)
        process.kill()
    LIMIT.write_text(f"{usual + 5}\n")
    with limited_to(None):
        pass
    assert int(LIMIT.read_text()) == usual + 5
    LIMIT.write_text(f"{usual}\n")

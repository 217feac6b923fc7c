"""What broke the file server of the kernel RFC of 2021, tried on this one in a stock guest."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.guest_agents import start_agent, start_watcher, status
from harness.share_server import Share, shared
from harness.vm import Guest, guest

TICKS = os.sysconf("SC_CLK_TCK")
# Speaks the protocol itself: /fsd-guest.pyz brings the codec.
SESSION = """
import json, os, sys
sys.path.insert(0, "/fsd-guest.pyz")
from protocol import frames
fd = os.open("/mnt/.fsd/session", os.O_RDWR)
reader = frames.FrameReader()

def send(*messages):
    os.pwrite(fd, b"".join(map(frames.encode, messages)), 0)

def receive():
    while True:
        for message in reader:
            return message
        reader.feed(os.pread(fd, 1 << 16, 0))

send(frames.Hello(frames.VERSION, frames.Role.BY_HAND, 0xFFF))
receive()

def node(path):
    send(frames.Resolve(1, path))
    found = receive()
    assert not found.errno, found
    return found.nodeid, found.generation

def update(nodeid, generation, mask):
    send(frames.Update(2, nodeid, generation, mask))
    return receive().errno
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Share, Guest]]:
    source = tmp_path_factory.mktemp("rfc")
    with shared(source) as server, guest({"share": server.paths[0]}) as vm:
        vm.mount("share")
        start_agent(vm)
        yield source, server, vm


Place = tuple[Path, Share, Guest]


def test_long_names(place: Place) -> None:
    """Names of 16 bytes and more did not fit, and 16 of them stopped notifications for good."""
    source, _, vm = place
    folder = source / "names"
    folder.mkdir()
    watcher = start_watcher(vm, "/mnt/names", form="%e %f")
    names = [f"{length:03}".ljust(length, "n") for length in (*range(16, 256), *range(16, 256, 7))]
    for name in names:
        (folder / name).mkdir()
        (folder / name).rmdir()
    (folder / "end").mkdir()
    watcher.wait_output("CREATE,ISDIR end", 60)
    expected = [f"{event},ISDIR {name}" for name in names for event in ("CREATE", "DELETE")]
    assert watcher.stdout.splitlines()[: len(expected)] == expected


def test_long_paths(place: Place) -> None:
    """Paths over 255 bytes were cut."""
    source, _, vm = place
    deep = source.joinpath("deep", *(f"{number}".ljust(200, "d") for number in range(12)))
    deep.mkdir(parents=True)
    inside = "/mnt" / deep.relative_to(source)
    assert len(str(inside)) > 2000
    watcher = start_watcher(vm, str(inside))
    (deep / "file").touch()
    watcher.wait_output("CREATE file", 20)
    (deep / "file").rename(source / "deep" / "file")
    watcher.wait_output("MOVED_FROM file", 20)


def test_masks_that_make_no_sense(place: Place) -> None:
    """A bad mask crashed it."""
    _, _, vm = place
    masks = [0x8000, 0x2000, 1 << 31, 1 << 30, 0x1000, 0x1101, 1 << 63, (1 << 64) - 1, 0xFFF << 32]
    code = f"""{SESSION}
root = node(b"")
answers = [update(*root, mask) for mask in {masks}]
print(json.dumps([answers, update(*root, 0x2100), update(*root, 0)]))
"""
    answers, good, removed = json.loads(vm.python(code, timeout=30))
    assert answers == [errno.EINVAL] * len(masks)
    assert (good, removed) == (0, 0)


def test_nodeids_of_64_bits(place: Place) -> None:
    """They were cut to 32."""
    source, _, vm = place
    (source / "wide").mkdir()
    code = f"""{SESSION}
nodeid, generation = node(b"wide")
others = [nodeid + (bit << 32) for bit in (1, 1 << 15, 1 << 31)]
print(json.dumps([
    nodeid,
    [update(other, generation, 0x100) for other in others],
    update(nodeid, generation + 1 & 0xFFFFFFFF, 0x100),
    update(nodeid, generation | 1 << 32, 0x100),
    update(nodeid, generation, 0x100),
    json.load(open("/mnt/.fsd/status"))["guests"],
    update(nodeid, generation, 0),
]))
"""
    nodeid, wide, *others, guests, removed = json.loads(vm.python(code, timeout=30))
    assert wide == [errno.ESTALE] * 3
    assert others == [errno.ESTALE, errno.ESTALE, 0]
    by_hand = next(state for state in guests if state["kind"] == "by hand")
    assert [mark["nodeid"] for mark in by_hand["armed"]] == [nodeid]
    assert removed == 0


@pytest.mark.timeout(180)
def test_a_hundred_thousand_requests(place: Place) -> None:
    """Each leaked a reference to an inode."""
    source, server, vm = place
    names = [f"many{number}" for number in range(20)]
    for name in names:
        (source / name).touch()
    code = f"""{SESSION}
nodes = [node(name.encode()) for name in {names}]
batch = [frames.Update(0, *key, mask) for key in nodes for mask in (0x100, 0x2, 0xFFF, 0)]
data = b"".join(map(frames.encode, batch)) * 10
for count in range(125):
    os.pwrite(fd, data, 0)
sent = 125 * 10 * len(batch)
assert update(1, 0xFFFF, 2)
os.close(fd)
for count in range(50):
    for name in {names}:
        os.stat("/mnt/" + name)
print(sent)
"""

    def held() -> tuple[int, int, list[str]]:
        state = status(vm)
        return state["inodes"], state["host_watches"], server.descriptors()

    vm.python(code.replace("range(125)", "range(1)").replace("range(50)", "range(1)"), timeout=60)
    before = held()
    assert int(vm.python(code, timeout=150)) >= 100_000
    # What looks around in the root keeps it watched for a moment.
    assert [*before[:1], before[2]] == [held()[0], held()[2]]


def test_rest_costs_nothing(place: Place) -> None:
    """It span a core."""
    _, server, vm = place
    start_watcher(vm, "/mnt")

    def ticks() -> int:
        fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    vm.run("sleep 5")  # the looking around of before is over
    before = ticks()
    vm.run("sleep 5")
    assert ticks() - before <= 0.05 * 5 * TICKS

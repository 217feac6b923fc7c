"""The device under any sequence of messages, sensible or not, over memory with anything in it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from fsd.virtio.device import Device, DeviceError
from protocol.vhostuser import (
    U64,
    Config,
    Empty,
    Payload,
    Raw,
    Region,
    Regions,
    Request,
    Type,
    VringAddr,
    VringState,
)

SIZE = 1 << 16
USER = 0x7000_0000
SMALL = st.one_of(st.integers(0, 3), st.sampled_from([16, 64, 0x100, 1 << 26, 1 << 32]))
ANY = st.one_of(SMALL, st.integers(0, 2**64 - 1))
INDEX = st.one_of(st.integers(0, 1), st.integers(0, 2**32 - 1))
RING = st.one_of(
    st.integers(0, SIZE // 64).map(lambda n: USER + 64 * n),
    st.sampled_from([USER + 1, USER + SIZE - 16, 0, 2**64 - 16]),
)
REGION = st.builds(
    Region,
    st.sampled_from([0, SIZE, SIZE // 2, 2**64 - SIZE]),
    st.sampled_from([SIZE, SIZE // 2, 4096, 0, 2**40]),
    st.sampled_from([USER, USER + SIZE, 0]),
    st.sampled_from([0, 4096, 100, 2**63]),
)
GOOD = Region(0, SIZE, USER, 0)
ADDR = st.builds(VringAddr, INDEX, st.just(0), RING, RING, RING, st.just(0))
DESCRIPTOR = st.tuples(
    st.one_of(st.integers(4096, SIZE), st.integers(4096, SIZE), ANY),
    st.one_of(st.integers(0, 64), st.integers(0, 64), st.integers(0, 2**32 - 1)),
    st.sampled_from([0, 0, 2, 2, 1, 3, 4, 5, 7]),
    st.integers(0, 16),
)
STATE = st.builds(VringState, INDEX, SMALL)


def message(code: Type, payload: st.SearchStrategy[Payload], fds: str = "") -> st.SearchStrategy:
    return st.tuples(st.just(code), payload, st.just(fds))


MESSAGES = st.one_of(
    message(Type.SET_MEM_TABLE, st.just(Regions((GOOD,))), "m"),
    message(Type.SET_MEM_TABLE, st.builds(lambda a, b: Regions((a, b)), REGION, REGION), "mm"),
    message(Type.ADD_MEM_REG, REGION, "m"),
    message(Type.REM_MEM_REG, REGION),
    message(Type.SET_VRING_NUM, st.builds(VringState, INDEX, st.sampled_from([0, 3, 16, 1 << 20]))),
    message(Type.SET_VRING_ADDR, ADDR),
    message(Type.SET_VRING_BASE, STATE),
    message(Type.GET_VRING_BASE, STATE),
    message(Type.SET_VRING_KICK, st.builds(U64, st.sampled_from([0, 1, 200])), "e"),
    message(Type.SET_VRING_KICK, st.just(U64(0x100))),
    message(Type.SET_VRING_CALL, st.builds(U64, st.sampled_from([0, 1, 200])), "e"),
    message(Type.SET_VRING_ERR, st.builds(U64, st.sampled_from([0, 1, 200])), "e"),
    message(Type.SET_VRING_ENABLE, st.builds(VringState, INDEX, st.integers(0, 1))),
    message(Type.SET_FEATURES, st.builds(U64, ANY)),
    message(Type.SET_PROTOCOL_FEATURES, st.builds(U64, ANY)),
    message(Type.SET_STATUS, st.builds(U64, SMALL)),
    message(Type.GET_CONFIG, st.just(Config(0, 3, 0, b"abc"))),
    message(Type.RESET_DEVICE, st.just(Empty())),
    message(Type.SET_LOG_BASE, st.just(Raw(b"")), "m"),
)
# What sets queue 0 up, so that not every example must find it.
PRELUDE: list[tuple[Type, Payload, str]] = [
    (Type.SET_MEM_TABLE, Regions((GOOD,)), "m"),
    (Type.SET_VRING_NUM, VringState(0, 16), ""),
    (Type.SET_VRING_ADDR, VringAddr(0, 0, USER, USER + 1024, USER + 512, 0), ""),
    (Type.SET_VRING_CALL, U64(0), "e"),
    (Type.SET_VRING_KICK, U64(0), "e"),
    (Type.SET_VRING_ENABLE, VringState(0, 1), ""),
]


class Answering:
    """A session that answers some at once, some later, some when it is closed."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def serve(
        self,
        readable: Sequence[memoryview],
        writable: Sequence[memoryview],
        done: Callable[[int], None],
    ) -> None:
        def answer() -> None:
            for view in writable:
                view[:1] = b"x"
            done(len(writable))

        if sum(map(len, readable)) % 2:
            answer()
        else:
            self.waiting.append(answer)

    def serve_again(
        self,
        readable: Sequence[memoryview],
        writable: Sequence[memoryview],
        done: Callable[[int], None],
        *,
        safe: bool,
    ) -> None:
        self.serve(readable, writable, done)

    def suspend(self) -> None:
        self.waiting.clear()

    def close(self) -> None:
        while self.waiting:
            self.waiting[0]()
            del self.waiting[0]


def descriptors() -> set[str]:
    """Of this process; without the listing's own."""
    listing = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    try:
        return set(os.listdir(listing)) - {str(listing)}
    finally:
        os.close(listing)


@settings(max_examples=400)
@given(
    table=st.lists(DESCRIPTOR, min_size=16, max_size=16),
    heads=st.lists(st.integers(0, 16), max_size=17),
    messages=st.lists(MESSAGES, max_size=25),
    prepared=st.booleans(),
    needs_reply=st.booleans(),
)
@example(  # a reset while a request waits that has no room for an answer
    table=[(4096, 2, 0, 0)] * 16,
    heads=[0],
    messages=[(Type.RESET_DEVICE, Empty(), "")],
    prepared=True,
    needs_reply=True,
)
def test_any_messages(
    table: list[tuple[int, int, int, int]],
    heads: list[int],
    messages: list[tuple[Type, Payload, str]],
    prepared: bool,
    needs_reply: bool,
) -> None:
    """Done, refused to the front-end, or one error; all is answered that a session that ends can
    answer, and no descriptor is left.
    """
    open_before = descriptors()
    sessions: list[Answering] = []

    def new_session() -> Answering:
        sessions.append(Answering())
        return sessions[-1]

    ram = os.memfd_create("ram")
    os.ftruncate(ram, SIZE)
    os.pwrite(ram, b"".join(struct.pack("<QIHH", *entry) for entry in table), 0)
    os.pwrite(ram, struct.pack(f"<HH{len(heads)}H", 0, len(heads), *heads), 512)
    running: set[int] = set()
    device = Device(
        new_session, on_start=running.add, on_stop=running.remove, tag="t", request_queues=1
    )
    for code, payload, kinds in PRELUDE * prepared + messages:
        fds = tuple(os.dup(ram) if kind == "m" else os.eventfd(0) for kind in kinds)
        try:
            answer = device.handle(Request(code, 1 | 8 * needs_reply, payload, fds))
            assert answer or not needs_reply
        except DeviceError:
            assert not needs_reply
        for index in list(running):
            assert device.rings[index].kick >= 0
            device.process(index, 20)
    device.close()
    assert not running
    assert not any(session.waiting for session in sessions)
    sessions.clear()
    del device
    os.close(ram)
    # Not how many: others, of tests before, may be closed by now.
    assert not descriptors() - open_before

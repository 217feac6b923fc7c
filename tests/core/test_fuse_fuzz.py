"""A hostile guest: random bytes and bent requests. The session answers each once at most, raises
never, and nothing beside the export is read or changed.
"""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fsd.fuse.session import FuseSession
from protocol import fuse
from protocol.fuse import Opcode

from .fuse_guest import ManualLoop
from .hostile import FILE_SIZE, Target, bent

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: as an ordinary user less is reached"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, hard))
    try:
        made = Target(tmp_path_factory.mktemp("fuzz"))
        yield made
        made.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


CUTS = st.lists(st.integers(0, 200), max_size=4)
ROOMS = st.sampled_from([0, 15, 16, 17, 80, 144, 160, 4096, 70_000])
FUZZ = settings(
    max_examples=600,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(message=st.binary(max_size=400), room=ROOMS, cut=CUTS)
@example(message=b"", room=0, cut=[])
@example(message=b"\xff" * 40, room=16, cut=[])
def test_random_bytes(message: bytes, room: int, cut: list[int], target: Target) -> None:
    target.serve(message, room, cut)
    target.check()


@FUZZ
@given(seed=st.integers(0, 1 << 40), room=ROOMS, cut=CUTS)
def test_bent_requests(seed: int, room: int, cut: list[int], target: Target) -> None:
    target.serve(bent(random.Random(seed)).message(target), room, cut)
    target.check()


@settings(FUZZ, max_examples=60)
@given(seed=st.integers(0, 1 << 40))
def test_a_session_of_bent_requests(seed: int, target: Target) -> None:
    """One after the other, so that what one has made is there for the next."""
    target.refill()
    rng = random.Random(seed)
    for _ in range(150):
        target.serve(bent(rng).message(target), 8192, [])
    target.check()
    target.leave()


def test_a_closed_session_still_answers(target: Target) -> None:
    session = FuseSession(target.world.mount(agent=False), ManualLoop())
    session.close()
    session.close()
    done: list[int] = []
    header = fuse.IN_HEADER.pack(40, Opcode.STATFS, 1, 1, 0, 0, 0, 0)
    session.serve([memoryview(header)], [memoryview(bytearray(100))], done.append)
    assert done == [16]


def test_the_fuzz_has_reached_something(target: Target) -> None:
    """After the tests above: nearly all kinds of request have succeeded as well as failed."""
    works = {opcode for opcode, error in target.answers if not error}
    fails = {opcode for opcode, error in target.answers if error}
    never = {*_UNKNOWN, *_WITHOUT_REPLY, Opcode.INIT, Opcode.DESTROY}
    assert len(set(Opcode) - works - never) <= 3, set(Opcode) - works - never
    assert len(set(Opcode) - fails - never) <= 3


_UNKNOWN = (Opcode.BMAP, Opcode.NOTIFY_REPLY, Opcode.SETUPMAPPING, Opcode.REMOVEMAPPING)
_WITHOUT_REPLY = (
    Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.FSYNC, Opcode.FSYNCDIR,
    Opcode.SYNCFS,
)  # fmt: skip

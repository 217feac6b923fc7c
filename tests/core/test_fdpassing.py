"""Descriptors in messages over Unix sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from fsd.linux import fdpassing


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def identity(fd: int) -> tuple[int, int]:
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino


@pytest.mark.parametrize("count", [1, 2, 3, fdpassing.MOST])
def test_each_arrives_once_and_is_not_inherited(
    pair: tuple[socket.socket, socket.socket], count: int
) -> None:
    read, write = os.pipe()
    pair[0].sendmsg([b"data"], fdpassing.ancillary([read, write, *[read] * count][:count]))
    data, fds = fdpassing.receive(pair[1], 100, count)
    try:
        assert data == b"data"
        assert len(fds) == count
        assert {identity(fd) for fd in fds} == {identity(read), identity(write)}
        assert not any(os.get_inheritable(fd) for fd in fds)
    finally:
        for fd in (*fds, read, write):
            os.close(fd)


def test_a_message_without_any(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendmsg([b"data"], fdpassing.ancillary([]))
    assert fdpassing.receive(pair[1], 100, 3) == (b"data", [])


def test_no_more_than_fit(pair: tuple[socket.socket, socket.socket]) -> None:
    """The kernel closes the others."""
    open_before = set(os.listdir("/proc/self/fd"))
    pair[0].sendmsg([b"data"], fdpassing.ancillary([0] * 9))
    _, fds = fdpassing.receive(pair[1], 100, 4)
    assert len(fds) == 4
    for fd in fds:
        os.close(fd)
    assert set(os.listdir("/proc/self/fd")) == open_before


def test_what_is_no_descriptor() -> None:
    credentials = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, bytes(12))
    assert fdpassing.received([credentials]) == []

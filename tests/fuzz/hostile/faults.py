"""What a hostile guest's kernel and its VMM do to the device itself."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from harness.vhost_frontend import INDIRECT, NEXT, WRITE
from protocol.fuse import Opcode
from protocol.vhostuser import NO_FD, U64, Region, Type, VringState

from .guest import Guest
from .machine import Gone, Ring
from .operations import TABLE, operation

PAUSE = 0.02
"""Seconds in which the server takes in what is wrong before the VMM comes anew."""


@operation(0.05)
def remount(guest: Guest) -> None:
    """DESTROY and INIT, with all handles and nodes still held."""
    guest.submit(Opcode.DESTROY, 0, label="destroy")
    guest.forget_all()
    guest.init()


@operation(0.05)
def init_again(guest: Guest) -> None:
    """INIT without DESTROY, as a guest that was reset."""
    guest.forget_all()
    guest.init()


def start_anew(guest: Guest) -> None:
    """The VMM is killed, whatever is under way, and another comes."""
    guest.close()
    guest.forget_all()
    guest.connect()


@operation(0.05)
def disconnect(guest: Guest) -> None:
    start_anew(guest)


@operation(0.03)
def stop_and_start(guest: Guest) -> None:
    """As QEMU stops and starts a device."""
    with suppress(OSError, AssertionError):
        guest.front.stop(2)
    start_anew(guest)


def _raw(guest: Guest, ring: Ring) -> None:
    """Descriptors that no kernel writes, in all of the ring."""
    rng = guest.rng
    for index in range(ring.size):
        address = rng.choice((0, 0x1000, guest.MEMORY - 8, guest.MEMORY, 1 << 40, (1 << 64) - 8))
        length = rng.choice((0, 16, 4096, 1 << 20, 0xFFFF_FFFF))
        flags = rng.choice((0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, 0xFFFF))
        ring.queue.put_desc(index, address, length, flags, rng.randrange(ring.size + 2) & 0xFFFF)
    for _ in range(rng.randrange(1, 200)):
        ring.offer(rng.randrange(ring.size + 1))
    ring.queue.kick()


@operation(0.05)
def broken_chains(guest: Guest) -> None:
    """Chains that loop, lead nowhere or lie about their length."""
    _raw(guest, guest.rng.choice((guest.requests, guest.priority)))
    time.sleep(PAUSE)
    start_anew(guest)


@operation(0.05)
def index_that_jumps(guest: Guest) -> None:
    """The available index claims more than there can be."""
    ring = guest.rng.choice((guest.requests, guest.priority))
    ring.skip(guest.rng.choice((1, ring.size + 1, 0x8000, 0xFFFF)))
    ring.queue.kick()
    time.sleep(PAUSE)
    start_anew(guest)


@operation(0.05)
def memory_of_noise(guest: Guest) -> None:
    """Rings and requests overwritten while the server reads them."""
    ring = guest.requests
    for _ in range(20):
        place = guest.rng.choice((ring.queue.desc, ring.queue.avail, ring.queue.used))
        noise = guest.rng.randbytes(64)
        guest.ram.bytes[place : place + 64] = noise
        ring.queue.kick()
    time.sleep(PAUSE)
    start_anew(guest)


@operation(0.05)
def wrong_messages(guest: Guest) -> None:
    """vhost-user messages that a VMM does not send then, or that are none."""
    rng, front = guest.rng, guest.front
    fds = [os.eventfd(0), os.memfd_create("x"), os.open("/dev/null", os.O_RDONLY)]
    try:
        for _ in range(rng.randrange(1, 8)):
            kind = rng.randrange(8)
            if kind == 0:
                front.send_bytes(rng.randbytes(rng.randrange(40)))
            elif kind == 1:
                front.tell(Type.SET_VRING_KICK, U64(rng.choice((0, 1, 99, NO_FD))), [fds[1]])
            elif kind == 2:
                front.tell(Type.SET_VRING_CALL, U64(rng.randrange(3)), [fds[2]])
            elif kind == 3:
                front.tell(Type.SET_VRING_NUM, VringState(rng.randrange(3), guest.number() % 2**32))
            elif kind == 4:
                front.tell(Type.SET_VRING_ENABLE, VringState(rng.randrange(3), rng.randrange(3)))
            elif kind == 5:
                region = Region(guest.number(), guest.number(), guest.number(), guest.number())
                front.tell(Type.ADD_MEM_REG, region, [fds[1]])
            elif kind == 6:
                front.tell(Type.SET_FEATURES, U64(rng.getrandbits(64)), fds)
            else:
                front.tell(rng.choice(list(Type)))
    except OSError:
        pass  # it has closed the connection
    finally:
        for fd in fds:
            os.close(fd)
    time.sleep(PAUSE)
    start_anew(guest)


@operation(0.03)
def memory_that_shrinks(guest: Guest) -> None:
    """The VMM cuts the memory short while requests lie in it: touching it is a SIGBUS here."""
    for _ in range(10):
        guest.submit(Opcode.STATFS, 1, label="memory_that_shrinks")
    os.ftruncate(guest.ram.fd, guest.rng.choice((0, 4096)))
    os.eventfd_write(guest.requests.queue.kick_fd, 1)
    time.sleep(PAUSE)
    os.ftruncate(guest.ram.fd, guest.MEMORY)  # this process reads it, too
    start_anew(guest)


@operation(0.03)
def signal_that_waits(guest: Guest) -> None:
    """The eventfd by which the server signals is full, and a write to it waits."""
    full = os.eventfd(0)
    os.eventfd_write(full, 2**64 - 2)
    try:
        guest.front.tell(Type.SET_VRING_CALL, U64(1), [full])
        for _ in range(10):
            guest.submit(Opcode.STATFS, 1, label="signal_that_waits")
        time.sleep(4 * PAUSE)
    except OSError:
        pass
    finally:
        os.close(full)
    start_anew(guest)


@operation(0.02)
def many_connections(guest: Guest) -> None:
    """VMMs that come and go without a word."""
    guest.close()
    guest.forget_all()
    for _ in range(guest.rng.randrange(30)):
        with suppress(OSError, AssertionError):
            front = type(guest.front)(guest.path)
            if guest.rng.random() < 0.5:
                front.tell(Type.GET_FEATURES)
            front.close()
    guest.connect()


def step(guest: Guest, name: str) -> None:
    """Do one operation of the table; a guest whose connection is gone starts anew."""
    guest.operation = name
    try:
        TABLE[name][1](guest)
        guest.reap()
    except Gone:
        start_anew(guest)

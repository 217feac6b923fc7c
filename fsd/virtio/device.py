"""A vhost-user-fs device: what one VMM has set up, its queues, and the FUSE session behind them.

The front-end chooses the order of messages; a queue runs while it has a size, addresses, a kick and
is enabled. If a front-end stops its queues and starts them where they were (a paused machine), the
session continues; if it starts them from the beginning (a machine reset), there is a new session.

Longer than other modules, because each message of the front-end has its handler here, and all of
them change the same few values.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple
from typing import Protocol as Interface

import structlog

from protocol.vhostuser import (
    F_PROTOCOL_FEATURES,
    INDEX_MASK,
    U64,
    Config,
    Empty,
    Inflight,
    Payload,
    Protocol,
    Region,
    Regions,
    Request,
    Type,
    VringAddr,
    VringState,
    name_of,
    reply,
)

from .inflight import TRIES, InflightError, InflightMemory
from .memory import MAX_REGIONS, GuestMemory, GuestMemoryError, MappedRegion
from .queue import MAX_SIZE, ChainError, QueueError, VirtQueue
from .ring import Ring

log = structlog.get_logger()
F_INDIRECT_DESC, F_VERSION_1 = 1 << 28, 1 << 32  # VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_F_VERSION_1
FEATURES = F_VERSION_1 | F_INDIRECT_DESC | F_PROTOCOL_FEATURES
PROTOCOL = (
    Protocol.MQ
    | Protocol.REPLY_ACK
    | Protocol.INFLIGHT_SHMFD
    | Protocol.RESET_DEVICE
    | Protocol.CONFIGURE_MEM_SLOTS
    | Protocol.STATUS
)
MAX_QUEUES = 65
"""Queue 0 for FORGET, the rest for requests; more queues than the guest's processors are of no
use."""
TAG_LENGTH = 36
_CONFIG = struct.Struct(f"<{TAG_LENGTH}sI")  # struct virtio_fs_config: tag, num_request_queues
OWN_INFLIGHT = int(Type.GET_INFLIGHT_FD)
"""Among the messages that a device resumes with: the memory of its own for requests under way."""


class DeviceError(Exception):
    """The front-end asked for something that is not valid now, or cannot be done."""


class Session(Interface):
    """Answers FUSE messages: fsd.fuse.session.FuseSession."""

    def serve(
        self,
        readable: Sequence[memoryview],
        writable: Sequence[memoryview],
        done: Callable[[int], None],
    ) -> None:
        """Serve one request: ``done`` is called once, now or later, with the length of the reply.
        Until then the reply goes into what ``writable`` holds at that time: after a reset,
        elsewhere.
        """

    def serve_again(
        self,
        readable: Sequence[memoryview],
        writable: Sequence[memoryview],
        done: Callable[[int], None],
        *,
        safe: bool,
    ) -> None:
        """As ``serve``, for a request that an earlier session may have carried out already, in part
        or completely. If not ``safe``, it must not even be tried.
        """

    def suspend(self) -> None:
        """Answer nothing any more: waiting requests are sent again to the next session, or to this
        one after a reconnection.
        """

    def close(self) -> None:
        """The guest has disconnected."""


class Listener(Interface):
    """Records the messages to a device: conversation.Conversation."""

    def said(self, request: Request) -> None:
        """A message was carried out."""

    def began(self, memory: InflightMemory) -> None:
        """The device records requests under way there, in memory of its own."""

    def stopped(self, index: int, position: int) -> None:
        """A queue was stopped at that position."""

    @property
    def holds(self) -> bool:
        """Whether any of it outlives this process."""


class Left(NamedTuple):
    """What remains for a front-end that may reconnect: its session, and the memory that it will
    name (st_dev, st_ino).
    """

    session: Session
    inflight: tuple[int, int]


class Device:
    """The device of one connection. ``on_start`` and ``on_stop`` are called with the queue that
    runs from now on, whose ``rings[index].kick`` is to be waited for, or that has stopped.
    """

    def __init__(
        self,
        new_session: Callable[[], Session],
        *,
        on_start: Callable[[int], None],
        on_stop: Callable[[int], None],
        tag: str = "",
        request_queues: int = 1,
        listener: Listener | None = None,
        left: Left | None = None,
        on_broken: Callable[[str], None] = lambda why: None,
    ) -> None:
        """``tag``: for front-ends that ask the device for it; without one they get none. ``left``:
        of the previous connection, for a front-end that names the same memory. ``on_broken`` is
        called, in the middle of the work, with the reason why the device can do nothing more: close
        it later.
        """
        self._new_session = new_session
        self._session: Session | None = None
        self._listener = listener
        self._left = left
        self._inflight: InflightMemory | None = None
        self._comes_back = False  # the front-end may: it has the memory
        self._is_resuming = False
        self._on_start = on_start
        self._on_stop = on_stop
        self._config = _CONFIG.pack(tag.encode(), request_queues) if tag else b""
        self._offered = PROTOCOL | Protocol.CONFIG if tag else PROTOCOL
        self._status = 0
        self._memory = GuestMemory()
        self._on_broken = on_broken
        self.rings = [Ring(on_broken) for _ in range(MAX_QUEUES)]
        self.counts: Counter[str] = Counter()
        self._handlers: dict[int, Callable[[Request], Payload | None]] = {
            Type.GET_FEATURES: lambda _: U64(FEATURES),
            Type.SET_FEATURES: self._set_features,
            Type.SET_OWNER: _nothing,
            Type.RESET_OWNER: _nothing,  # as the norm recommends
            Type.GET_PROTOCOL_FEATURES: lambda _: U64(self._offered),
            Type.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Type.GET_QUEUE_NUM: lambda _: U64(MAX_QUEUES),
            Type.GET_MAX_MEM_SLOTS: lambda _: U64(MAX_REGIONS),
            Type.SET_MEM_TABLE: self._set_mem_table,
            Type.ADD_MEM_REG: self._add_mem_reg,
            Type.REM_MEM_REG: self._rem_mem_reg,
            Type.SET_VRING_NUM: self._set_vring_num,
            Type.SET_VRING_ADDR: self._set_vring_addr,
            Type.SET_VRING_BASE: self._set_vring_base,
            Type.GET_VRING_BASE: self._get_vring_base,
            Type.SET_VRING_KICK: self._set_vring_kick,
            Type.SET_VRING_CALL: self._set_vring_call,
            Type.SET_VRING_ERR: self._set_vring_err,
            Type.SET_VRING_ENABLE: self._set_vring_enable,
            Type.GET_CONFIG: self._get_config,
            Type.SET_STATUS: self._set_status,
            Type.GET_STATUS: lambda _: U64(self._status),
            Type.RESET_DEVICE: self._reset_device,
            Type.GET_INFLIGHT_FD: self._get_inflight,
            Type.SET_INFLIGHT_FD: self._set_inflight,
        }

    def _memory_lost(self) -> None:
        self._on_broken("its memory has gone: the file was cut short, or no page is left for it")

    def close(self) -> None:
        """The front-end has gone."""
        try:
            self._reset()
        finally:
            self._close()

    def leave(self) -> Left | None:
        """The connection is lost. Returns what remains if the front-end may reconnect; else like
        close.
        """
        if self._session is None or self._inflight is None or not self._comes_back:
            self.close()
            return None
        left = Left(self._session, self._inflight.identity)
        self.suspend()
        self._session = None
        self._close()
        return left

    def suspend(self) -> None:
        """Run no queue and answer nothing from now on: another process will continue."""
        for index in range(len(self.rings)):
            self._stop(index)
            self.rings[index].in_flight.clear()
        if self._session is not None:
            self._session.suspend()

    def _close(self) -> None:
        for ring in self.rings:
            ring.close()
        self._memory = GuestMemory()
        if self._inflight is not None:
            self._inflight.close()
            self._inflight = None
        self._drop_left()

    def _drop_left(self) -> None:
        left, self._left = self._left, None
        if left is not None:
            _end(left.session)

    def resume(self, requests: Sequence[Request], session: Session | None) -> None:
        """Continue from the device of an earlier process, to which these messages were sent. Takes
        their descriptors. Raises DeviceError.
        """
        self._session = session
        self._is_resuming = True
        failed = ""
        for request in requests:
            if request.type == OWN_INFLIGHT:
                assert isinstance(request.payload, Inflight)
                self._note_in(InflightMemory(request.fds[0], request.payload, self._memory_lost))
                continue
            try:
                self.handle(request)
            except DeviceError as error:
                failed = str(error)
        if failed:
            raise DeviceError(failed)
        self._is_resuming = False
        try:
            for index in range(len(self.rings)):
                self._update(index)
        except (InflightError, QueueError, OSError) as error:
            raise DeviceError(str(error)) from None

    # Messages

    def handle(self, request: Request) -> bytes:
        """Carry out a message; returns what to send back, with ``reply_fds``. Takes its
        descriptors.

        Raises DeviceError if it failed and the front-end does not wait for an answer.
        """
        self.reply_fds: tuple[int, ...] = ()
        try:
            answer = self._dispatch(request)
            if self._listener is not None and not self._is_resuming:
                self._listener.said(request)
        except (DeviceError, GuestMemoryError, InflightError, QueueError, OSError) as error:
            if not request.needs_reply:
                raise DeviceError(f"{name_of(request.type)}: {error}") from None
            log.warning(
                "vhost-user request failed", request=name_of(request.type), error=str(error)
            )
            return reply(request, U64(1))
        finally:
            for fd in request.fds:
                os.close(fd)
        if answer is not None:
            return reply(request, answer)
        return reply(request, U64(0)) if request.needs_reply else b""

    def _dispatch(self, request: Request) -> Payload | None:
        handler = self._handlers.get(request.type)
        if handler is not None:
            return handler(request)
        if request.needs_reply:
            raise DeviceError("not offered")
        log.warning("vhost-user request ignored", request=name_of(request.type))
        return None

    def _set_features(self, request: Request) -> None:
        value = _u64(request)
        if value & ~FEATURES:
            raise DeviceError(f"features {value & ~FEATURES:#x} were not offered")
        if not value & F_PROTOCOL_FEATURES:  # then nothing enables them
            for ring in self.rings:
                ring.is_enabled = True

    def _set_protocol_features(self, request: Request) -> None:
        value = _u64(request)
        if value & ~self._offered:
            raise DeviceError(f"protocol features {value & ~self._offered:#x} were not offered")

    def _set_mem_table(self, request: Request) -> None:
        assert isinstance(request.payload, Regions)
        pairs = zip(request.payload.regions, request.fds, strict=True)
        self._memory.replace([MappedRegion(region, fd, self._memory_lost) for region, fd in pairs])
        self._remap()

    def _add_mem_reg(self, request: Request) -> None:
        assert isinstance(request.payload, Region)
        self._memory.add(MappedRegion(request.payload, request.fds[0], self._memory_lost))

    def _rem_mem_reg(self, request: Request) -> None:
        assert isinstance(request.payload, Region)
        self._memory.remove(request.payload)
        self._remap()

    def _remap(self) -> None:
        """Memory has changed while queues run."""
        for index, ring in enumerate(self.rings):
            if ring.queue is not None:
                try:
                    ring.queue = self._queue(ring, ring.queue.position)
                except QueueError as error:
                    self._break(index, error)

    def _ring(self, request: Request) -> tuple[int, Ring, int]:
        """The queue that a message is about, and its number."""
        payload = request.payload
        if isinstance(payload, U64):
            index, value = payload.value & INDEX_MASK, 0
        elif isinstance(payload, VringState):
            index, value = payload
        else:
            assert isinstance(payload, VringAddr)
            index, value = payload.queue, 0
        if index >= len(self.rings):
            raise DeviceError(f"queue {index} of {len(self.rings)}")
        return index, self.rings[index], value

    def _stopped(self, request: Request) -> tuple[int, Ring, int]:
        found = self._ring(request)
        if found[1].queue is not None:
            raise DeviceError(f"queue {found[0]} is running")
        return found

    def _set_vring_num(self, request: Request) -> None:
        index, ring, size = self._stopped(request)
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise DeviceError(f"queue {index} of {size} entries")
        ring.size = size

    def _set_vring_addr(self, request: Request) -> None:
        index, ring, _ = self._ring(request)
        assert isinstance(request.payload, VringAddr)
        ring.address = request.payload
        if ring.queue is not None:
            ring.queue = self._queue(ring, ring.queue.position)
        self._update(index)

    def _set_vring_base(self, request: Request) -> None:
        _, ring, position = self._stopped(request)
        if position > 0xFFFF:
            raise DeviceError(f"base {position}")
        comes_back = self._comes_back and ring.noted is None  # it sends what it knows
        if position != ring.position and not (self._is_resuming or comes_back):
            self._forget_session()  # the machine was reset without a message
        ring.position = position

    def _get_vring_base(self, request: Request) -> VringState:
        index, ring, _ = self._ring(request)
        self._stop(index)
        ring.drop_fd("kick")
        if self._listener is not None:
            self._listener.stopped(index, ring.position)
        return VringState(index, ring.position)

    def _set_vring_kick(self, request: Request) -> None:
        index, ring, _ = self._ring(request)
        if not request.fds:
            raise DeviceError(f"queue {index} without a kick: polling is not offered")
        self._stop(index)
        ring.take_fd("kick", request)
        self._update(index)

    def _set_vring_call(self, request: Request) -> None:
        _, ring, _ = self._ring(request)
        ring.take_fd("call", request)
        # A used entry may have been signalled to the previous one, which is not read any more.
        if ring.queue is not None:
            ring.signal()

    def _set_vring_err(self, request: Request) -> None:
        _, ring, _ = self._ring(request)
        ring.take_fd("err", request)

    def _set_vring_enable(self, request: Request) -> None:
        index, ring, enable = self._ring(request)
        ring.is_enabled = bool(enable)
        if enable:
            self._update(index)
        else:
            self._stop(index)

    def _get_config(self, request: Request) -> Payload:
        assert isinstance(request.payload, Config)
        offset, size, flags, _ = request.payload
        if not self._config:
            return Empty()  # an error, in the norm's words
        content = self._config.ljust(offset + size, b"\0")[offset : offset + size]
        return Config(offset, size, flags, content)

    def _set_status(self, request: Request) -> None:
        self._status = _u64(request) & 0xFF
        if not self._status:
            self._reset()

    def _reset_device(self, _request: Request) -> None:
        self._reset()

    # Requests under way

    def _get_inflight(self, request: Request) -> Inflight | None:
        asked = request.payload
        assert isinstance(asked, Inflight)
        if not 0 < asked.num_queues <= MAX_QUEUES or not 0 < asked.queue_size <= MAX_SIZE:
            raise DeviceError(f"{asked.num_queues} queues of {asked.queue_size} entries")
        memory = InflightMemory.new(asked.num_queues, asked.queue_size, self._memory_lost)
        self._note_in(memory)
        self.reply_fds = (memory.fd,)
        return memory.layout

    def _note_in(self, memory: InflightMemory) -> None:
        if self._inflight is not None:
            self._inflight.close()
        self._inflight = memory

    def _set_inflight(self, request: Request) -> None:
        assert isinstance(request.payload, Inflight)
        if any(ring.queue is not None for ring in self.rings):
            raise DeviceError("queues are running")
        memory = InflightMemory(os.dup(request.fds[0]), request.payload, self._memory_lost)
        self._note_in(memory)
        self._comes_back = True
        left, self._left = self._left, None
        if left is not None and left.inflight == memory.identity:
            self._session = left.session
        elif left is not None:
            _end(left.session)

    # Queues

    def _queue(self, ring: Ring, position: int) -> VirtQueue:
        address = ring.address
        assert address is not None
        return VirtQueue(
            self._memory, ring.size, address.desc, address.avail, address.used, position
        )

    def _update(self, index: int) -> None:
        """Start a queue that has everything it needs."""
        ring = self.rings[index]
        if ring.queue is not None or not ring.is_ready or self._is_resuming:
            return
        queue = self._queue(ring, ring.position)
        if self._inflight is None and self._listener is not None and self._listener.holds:
            memory = InflightMemory.new(MAX_QUEUES, MAX_SIZE, self._memory_lost)
            self._note_in(memory)
            self._listener.began(memory)
        if self._inflight is not None and ring.noted is None:
            ring.note_in(self._inflight.queue(index, ring.size), queue)
        ring.start(queue)
        self._on_start(index)

    def _stop(self, index: int) -> None:
        ring = self.rings[index]
        if ring.queue is not None:
            ring.position = ring.queue.position
            ring.queue = None
            self._on_stop(index)

    def _break(self, index: int, error: QueueError) -> None:
        """The guest has broken a queue: it stays stopped until the front-end starts it again."""
        self.counts["broken_queues"] += 1
        log.warning("queue stopped", queue=index, error=str(error))
        self._stop(index)
        self.rings[index].is_enabled = False
        self.rings[index].complain()

    def _reset(self) -> None:
        """Reset all queues to the initial state, without a session."""
        for index, ring in enumerate(self.rings):
            self._stop(index)
            ring.position, ring.is_enabled = 0, False
        self._forget_session()

    def _forget_session(self) -> None:
        session, self._session = self._session, None
        for ring in self.rings:
            ring.forget()
        if self._inflight is not None:
            for index in range(len(self.rings)):
                self._inflight.wipe(index)
        if session is not None:
            _end(session)

    # Requests

    def process(self, index: int, budget: int, until: float = math.inf) -> bool:
        """Serve requests of a queue, ``budget`` at most, and none after time.perf_counter() has
        reached ``until``; returns whether more are waiting.
        """
        ring = self.rings[index]
        ring.delay_signals()
        try:
            return self._process(index, ring, budget, until)
        finally:
            ring.signal_delayed()

    def _process(self, index: int, ring: Ring, budget: int, until: float) -> bool:
        for _ in range(budget):
            try:
                taken = ring.take()
            except ChainError as error:
                self._bad_chain(index, error)
                ring.push(error.head, 0)
                continue
            except QueueError as error:
                self._break(index, error)
                return False
            if taken is None:
                return False
            chain, tries = taken
            noted = ring.noted
            done = partial(ring.answer, chain)
            try:
                if self._session is None:
                    self._drop_left()
                    self._session = self._new_session()
                if tries:
                    safe = tries < TRIES
                    self._session.serve_again(chain.readable, chain.writable, done, safe=safe)
                else:
                    self._session.serve(chain.readable, chain.writable, done)
            except Exception:
                self.counts["faults"] += 1
                log.exception("a FUSE request failed in the session")
                done(0)
            if noted is not None and noted is ring.noted and chain.head in ring.in_flight:
                noted.waits(chain.head)
            if perf_counter() >= until:
                break
        return ring.has_more

    def _bad_chain(self, index: int, error: ChainError) -> None:
        self.counts["bad_chains"] += 1
        if self.counts["bad_chains"] == 1:  # a guest shall not fill the log
            log.warning("bad request; further ones are only counted", queue=index, error=str(error))


def _end(session: Session) -> None:
    try:
        session.close()
    except Exception:
        log.exception("closing a FUSE session failed")


def _u64(request: Request) -> int:
    assert isinstance(request.payload, U64)
    return request.payload.value


def _nothing(_request: Request) -> None:
    """Nothing to do."""

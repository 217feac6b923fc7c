"""A checkpoint on disk: three files in a directory, created in one step.

    process.img   which process, on which file systems, and the digests of the other two
    files.img     the instances and sets, like CRIU's file of that name: file_entry messages
    fdinfo.img    their descriptors, like CRIU's: fdinfo_entry messages

Inside the envelope of ``protocol.images`` the last two are in CRIU's format (pycriu/images):

    IMAGE = MAGIC_COMMON MAGIC { SIZE MESSAGE }, numbers of 32 bits, little-endian

Apart because only this module needs protobuf: the rest of the guest tools runs without it. Bytes
that ``write`` could not have produced raise ImageError.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from typing import NoReturn, TypeVar

from google.protobuf.message import DecodeError, Message

from protocol import images
from protocol.images import ImageError

from . import watcher_pb2 as pb
from .notify import Owner, from_words, to_words
from .state import (
    Descriptor,
    Epoll,
    Fanotify,
    FanotifyMark,
    File,
    FileSystem,
    FileSystemMark,
    Identity,
    Inotify,
    MountMark,
    Object,
    ObjectMark,
    Queue,
    State,
    Target,
    Watch,
)

VERSION = 1
PROCESS, FILES, FDINFO = "process", "files", "fdinfo"
_COMMON_MAGIC = 0x5456_4319
_MAGICS = {FILES: 0x5630_3138, FDINFO: 0x5621_3732}
_HEAD = struct.Struct("<II")
_SIZE = struct.Struct("<I")
_INT_MAX = (1 << 31) - 1
_FD_CLOEXEC = 1

M = TypeVar("M", bound=Message)


def check_free(directory: str) -> None:
    """Raises OSError if ``write`` could not put a checkpoint here: the directory must be new or
    empty.
    """
    parent = os.path.dirname(os.path.abspath(directory))
    try:
        if os.listdir(directory):
            raise OSError(errno.ENOTEMPTY, "is not empty; give a new directory", directory)
    except FileNotFoundError:
        if not os.path.isdir(parent):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), parent) from None


def bodies(state: State) -> tuple[bytes, bytes, bytes]:
    """The contents of process.img, files.img and fdinfo.img."""
    files = _stream(FILES, (_file_entry(file) for file in state.files))
    fdinfo = _stream(FDINFO, _fdinfo_entries(state))
    files_sha256, fdinfo_sha256 = digests(files, fdinfo)
    process = pb.process_entry(
        pid=state.pid,
        command=state.command,
        kernel=state.kernel,
        files_sha256=files_sha256,
        fdinfo_sha256=fdinfo_sha256,
        filesystem=[
            pb.filesystem_entry(s_dev=f.sdev, fstype=f.fstype, source=f.source, fsid=f.fsid)
            for f in state.filesystems
        ],
    )
    return process.SerializeToString(), files, fdinfo


def digests(files: bytes, fdinfo: bytes) -> tuple[bytes, bytes]:
    """The digests of the other two files, for process.img."""
    return hashlib.sha256(files).digest(), hashlib.sha256(fdinfo).digest()


def write(directory: str, state: State) -> None:
    """Write a state to a directory that is new or empty: all of it or nothing. Raises OSError."""
    check_free(directory)
    target = os.path.abspath(directory)
    scratch = tempfile.mkdtemp(prefix=".checkpoint-", dir=os.path.dirname(target))
    try:
        for kind, body in zip((PROCESS, FILES, FDINFO), bodies(state)):
            with open(os.path.join(scratch, f"{kind}.img"), "xb") as image:
                image.write(images.pack(kind, VERSION, body))
                image.flush()
                os.fsync(image.fileno())
        os.rename(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def read(directory: str) -> State:
    """The state in a directory. Raises OSError, and ImageError, which names the file."""
    found = []
    for kind in (PROCESS, FILES, FDINFO):
        path = os.path.join(directory, f"{kind}.img")
        with open(path, "rb") as image:
            data = image.read()
        try:
            found.append(images.unpack(data, kind, VERSION))
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from None
    try:
        return parse(*found)
    except ImageError as error:
        raise ImageError(f"{directory}: {error}") from None


def parse(process_body: bytes, files_body: bytes, fdinfo_body: bytes) -> State:
    """The state of the three bodies. Raises ImageError."""
    process = _message(pb.process_entry, process_body)
    if digests(files_body, fdinfo_body) != (process.files_sha256, process.fdinfo_sha256):
        _refuse("the images are of different checkpoints")
    files = [_file(entry) for entry in _entries(FILES, files_body, pb.file_entry)]
    types = {file.id: _type(file) for file in files}
    descriptors = []
    for entry in _entries(FDINFO, fdinfo_body, pb.fdinfo_entry):
        if types.get(entry.id) != entry.type or entry.fd > _INT_MAX:
            _refuse(f"descriptor {entry.fd} refers to no file of the checkpoint")
        descriptors.append(Descriptor(entry.fd, bool(entry.flags & _FD_CLOEXEC), entry.id))
    _distinct("file", [file.id for file in files])
    _distinct("descriptor", [descriptor.fd for descriptor in descriptors])
    if set(types) != {descriptor.id for descriptor in descriptors}:
        _refuse("a file has no descriptor")
    for file in files:
        if isinstance(file, Epoll):
            for target in file.targets:
                if target.id and target.id not in types:
                    _refuse(f"entry {target.tfd} of an epoll set refers to no file")
    return State(
        process.pid,
        process.command,
        _text(process.kernel),
        [FileSystem(f.s_dev, f.fstype, f.source, f.fsid) for f in process.filesystem],
        files,
        descriptors,
    )


# The streams


def _stream(kind: str, entries: Iterable[Message]) -> bytes:
    parts = [_HEAD.pack(_COMMON_MAGIC, _MAGICS[kind])]
    for entry in entries:
        data = entry.SerializeToString()
        parts += [_SIZE.pack(len(data)), data]
    return b"".join(parts)


def _entries(kind: str, body: bytes, message: type[M]) -> Iterator[M]:
    if body[: _HEAD.size] != _HEAD.pack(_COMMON_MAGIC, _MAGICS[kind]):
        _refuse(f"{kind}.img does not hold an image of CRIU's form")
    offset = _HEAD.size
    while offset < len(body):
        if len(body) - offset < _SIZE.size:
            _refuse(f"{kind}.img ends within an entry")
        (size,) = _SIZE.unpack_from(body, offset)
        offset += _SIZE.size
        if size > len(body) - offset:
            _refuse(f"{kind}.img ends within an entry")
        yield _message(message, body[offset : offset + size])
        offset += size


def _message(message: type[M], data: bytes) -> M:
    parsed = message()
    try:
        parsed.ParseFromString(data)
    except (DecodeError, UnicodeDecodeError):
        _refuse(f"a {message.__name__} cannot be read")
    if not parsed.IsInitialized():
        _refuse(f"a {message.__name__} lacks fields")
    return parsed


def _refuse(why: str) -> NoReturn:
    raise ImageError(why)


def _distinct(what: str, numbers: list[int]) -> None:
    if len(set(numbers)) != len(numbers):
        _refuse(f"two entries for one {what}")


def _type(file: File) -> pb.fd_types:
    if isinstance(file, Inotify):
        return pb.INOTIFY
    return pb.FANOTIFY if isinstance(file, Fanotify) else pb.EVENTPOLL


# State -> messages


def _fdinfo_entries(state: State) -> Iterator[pb.fdinfo_entry]:
    types = {file.id: _type(file) for file in state.files}
    for fd, cloexec, file_id in state.descriptors:
        flags = _FD_CLOEXEC if cloexec else 0
        yield pb.fdinfo_entry(id=file_id, flags=flags, type=types[file_id], fd=fd)


def _file_entry(file: File) -> pb.file_entry:
    entry = pb.file_entry(type=_type(file), id=file.id)
    fown = pb.fown_entry(**file.owner._asdict())
    if isinstance(file, Inotify):
        entry.ify.id, entry.ify.flags = file.id, file.flags
        entry.ify.fown.CopyFrom(fown)
        entry.ify.wd.extend(_wd_entry(watch) for watch in file.watches)
        _put_queue(entry.ify.queue, file.queue)
    elif isinstance(file, Fanotify):
        entry.ffy.id, entry.ffy.flags = file.id, file.flags
        entry.ffy.faflags, entry.ffy.evflags = file.init_flags, file.event_flags
        entry.ffy.fown.CopyFrom(fown)
        for mark in file.marks:
            _put_mark(entry.ffy, mark)
        _put_queue(entry.ffy.queue, file.queue)
    else:
        entry.epfd.id, entry.epfd.flags = file.id, file.flags
        entry.epfd.fown.CopyFrom(fown)
        entry.epfd.tfd.extend(_tfd_entry(target) for target in file.targets)
    return entry


def _put_queue(entry: pb.queue_entry, queue: Queue) -> None:
    entry.size = queue.size
    if queue.events:
        entry.events = queue.events


def _wd_entry(watch: Watch) -> pb.inotify_wd_entry:
    identity = watch.object.identity
    return pb.inotify_wd_entry(
        id=0,
        i_ino=identity.ino,
        mask=watch.mask,
        ignored_mask=watch.ignored_mask,
        s_dev=identity.sdev,
        wd=watch.wd,
        f_handle=_fh_entry(watch.object),
    )


def _fh_entry(thing: Object) -> pb.fh_entry:
    identity = thing.identity
    entry = pb.fh_entry(
        bytes=len(identity.handle), type=identity.handle_type, handle=to_words(identity.handle)
    )
    if identity.handle:
        entry.kind = pb.DECODABLE if thing.decodable else pb.ENCODABLE
    else:
        entry.kind = pb.NO_HANDLE
    _put_path(entry, thing.path)
    if thing.deleted:
        entry.deleted = True
    return entry


def _put_path(entry: pb.fh_entry | pb.fanotify_mount_mark_entry, path: bytes) -> None:
    try:
        text = path.decode()
    except UnicodeDecodeError:
        entry.raw_path = path
        return
    if text:
        entry.path = text


def _put_mark(entry: pb.fanotify_file_entry, mark: FanotifyMark) -> None:
    if isinstance(mark, FileSystemMark):
        entry.sb_mark.add(
            mflags=mark.mflags, mask=mark.mask, ignored_mask=mark.ignored_mask, s_dev=mark.sdev
        )
        return
    sdev = mark.sdev if isinstance(mark, MountMark) else mark.object.identity.sdev
    added = entry.mark.add(
        id=0,
        type=pb.MOUNT if isinstance(mark, MountMark) else pb.INODE,
        mflags=mark.mflags,
        mask=mark.mask,
        ignored_mask=mark.ignored_mask,
        s_dev=sdev,
    )
    if isinstance(mark, MountMark):
        added.me.mnt_id = mark.mnt_id
        _put_path(added.me, mark.path)
    else:
        added.ie.i_ino = mark.object.identity.ino
        added.ie.f_handle.CopyFrom(_fh_entry(mark.object))


def _tfd_entry(target: Target) -> pb.eventpoll_tfd_entry:
    entry = pb.eventpoll_tfd_entry(
        id=0,
        tfd=target.tfd,
        events=target.events,
        data=target.data,
        dev=target.sdev,
        inode=target.ino,
        pos=target.pos,
        toff=target.toff,
        target=target.what,
    )
    if target.pid:
        entry.target_pid, entry.target_fd = target.pid, target.fd
    if target.id:
        entry.target_id = target.id
    return entry


# Messages -> state


def _file(entry: pb.file_entry) -> File:
    present = [name for name in ("ify", "ffy", "epfd") if entry.HasField(name)]
    wanted = {pb.INOTIFY: "ify", pb.FANOTIFY: "ffy", pb.EVENTPOLL: "epfd"}.get(entry.type)
    if present != [wanted] or not entry.id:
        _refuse("a file_entry is not of its type")
    if entry.type == pb.INOTIFY:
        watches = [_watch(wd) for wd in entry.ify.wd]
        _distinct("watch", [watch.wd for watch in watches])
        queue = _queue(entry.ify.queue)
        return Inotify(entry.id, entry.ify.flags, _owner(entry.ify.fown), watches, queue)
    if entry.type == pb.FANOTIFY:
        group = entry.ffy
        marks: list[FanotifyMark] = [_mark(mark) for mark in group.mark]
        marks += [FileSystemMark(m.mflags, m.mask, m.ignored_mask, m.s_dev) for m in group.sb_mark]
        return Fanotify(
            entry.id,
            group.flags,
            _owner(group.fown),
            group.faflags,
            group.evflags,
            marks,
            _queue(group.queue),
        )
    targets = [_target(tfd) for tfd in entry.epfd.tfd]
    return Epoll(entry.id, entry.epfd.flags, _owner(entry.epfd.fown), targets)


def _owner(entry: pb.fown_entry) -> Owner:
    if max(entry.signum, entry.pid_type, entry.pid) > _INT_MAX:
        _refuse("a fown_entry is out of range")
    return Owner(entry.uid, entry.euid, entry.signum, entry.pid_type, entry.pid)


def _queue(entry: pb.queue_entry) -> Queue:
    if entry.HasField("events") and len(entry.events) > entry.size:
        _refuse("a queue_entry holds more than there was")
    return Queue(entry.size, entry.events)


def _watch(entry: pb.inotify_wd_entry) -> Watch:
    if not 0 < entry.wd <= _INT_MAX:
        _refuse(f"{entry.wd} is no watch descriptor")
    watched = _object(entry.s_dev, entry.i_ino, entry.f_handle)
    return Watch(entry.wd, entry.mask, entry.ignored_mask, watched)


def _object(sdev: int, ino: int, entry: pb.fh_entry) -> Object:
    if entry.type > _INT_MAX:
        _refuse("a file handle's type is out of range")
    try:
        handle = from_words(entry.handle, entry.bytes)
    except ValueError as error:
        _refuse(str(error))
    identity = Identity(sdev, ino, entry.type, handle)
    return Object(identity, entry.kind == pb.DECODABLE, _path(entry), entry.deleted)


def _path(entry: pb.fh_entry | pb.fanotify_mount_mark_entry) -> bytes:
    path = entry.raw_path or _text(entry.path).encode()
    if b"\0" in path or (path and not path.startswith(b"/")):
        _refuse("a path is no absolute path")
    return path


def _text(value: str) -> str:
    """A string; protobuf's C library returns bytes if it is not UTF-8."""
    if not hasattr(value, "encode"):
        _refuse("a string is not UTF-8")
    return value


def _mark(entry: pb.fanotify_mark_entry) -> FanotifyMark:
    bits = entry.mflags, entry.mask, entry.ignored_mask
    if entry.type == pb.INODE and entry.HasField("ie"):
        return ObjectMark(*bits, _object(entry.s_dev, entry.ie.i_ino, entry.ie.f_handle))
    if entry.type == pb.MOUNT and entry.HasField("me"):
        return MountMark(*bits, entry.s_dev, entry.me.mnt_id, _path(entry.me))
    return _refuse("a fanotify_mark_entry is not of its type")


def _target(entry: pb.eventpoll_tfd_entry) -> Target:
    if max(entry.tfd, entry.toff, entry.target_pid, entry.target_fd) > _INT_MAX:
        _refuse("an eventpoll_tfd_entry is out of range")
    return Target(
        entry.tfd,
        entry.toff,
        entry.events,
        entry.data,
        entry.pos,
        entry.inode,
        entry.dev,
        entry.target_pid,
        entry.target_fd,
        entry.target_id,
        entry.target,
    )

from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DECODABLE: handle_kind
DESCRIPTOR: _descriptor.FileDescriptor
ENCODABLE: handle_kind
EVENTPOLL: fd_types
FANOTIFY: fd_types
INODE: mark_type
INOTIFY: fd_types
MOUNT: mark_type
NO_HANDLE: handle_kind
UND: fd_types

class eventpoll_file_entry(_message.Message):
    __slots__ = ["flags", "fown", "id", "tfd"]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    FOWN_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    TFD_FIELD_NUMBER: _ClassVar[int]
    flags: int
    fown: fown_entry
    id: int
    tfd: _containers.RepeatedCompositeFieldContainer[eventpoll_tfd_entry]
    def __init__(self, id: _Optional[int] = ..., flags: _Optional[int] = ..., fown: _Optional[_Union[fown_entry, _Mapping]] = ..., tfd: _Optional[_Iterable[_Union[eventpoll_tfd_entry, _Mapping]]] = ...) -> None: ...

class eventpoll_tfd_entry(_message.Message):
    __slots__ = ["data", "dev", "events", "id", "inode", "pos", "target", "target_fd", "target_id", "target_pid", "tfd", "toff"]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DEV_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    INODE_FIELD_NUMBER: _ClassVar[int]
    POS_FIELD_NUMBER: _ClassVar[int]
    TARGET_FD_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TARGET_ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_PID_FIELD_NUMBER: _ClassVar[int]
    TFD_FIELD_NUMBER: _ClassVar[int]
    TOFF_FIELD_NUMBER: _ClassVar[int]
    data: int
    dev: int
    events: int
    id: int
    inode: int
    pos: int
    target: bytes
    target_fd: int
    target_id: int
    target_pid: int
    tfd: int
    toff: int
    def __init__(self, id: _Optional[int] = ..., tfd: _Optional[int] = ..., events: _Optional[int] = ..., data: _Optional[int] = ..., dev: _Optional[int] = ..., inode: _Optional[int] = ..., pos: _Optional[int] = ..., toff: _Optional[int] = ..., target_pid: _Optional[int] = ..., target_fd: _Optional[int] = ..., target_id: _Optional[int] = ..., target: _Optional[bytes] = ...) -> None: ...

class fanotify_file_entry(_message.Message):
    __slots__ = ["evflags", "faflags", "flags", "fown", "id", "mark", "queue", "sb_mark"]
    EVFLAGS_FIELD_NUMBER: _ClassVar[int]
    FAFLAGS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    FOWN_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    MARK_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    SB_MARK_FIELD_NUMBER: _ClassVar[int]
    evflags: int
    faflags: int
    flags: int
    fown: fown_entry
    id: int
    mark: _containers.RepeatedCompositeFieldContainer[fanotify_mark_entry]
    queue: queue_entry
    sb_mark: _containers.RepeatedCompositeFieldContainer[fanotify_sb_mark_entry]
    def __init__(self, id: _Optional[int] = ..., flags: _Optional[int] = ..., fown: _Optional[_Union[fown_entry, _Mapping]] = ..., faflags: _Optional[int] = ..., evflags: _Optional[int] = ..., mark: _Optional[_Iterable[_Union[fanotify_mark_entry, _Mapping]]] = ..., queue: _Optional[_Union[queue_entry, _Mapping]] = ..., sb_mark: _Optional[_Iterable[_Union[fanotify_sb_mark_entry, _Mapping]]] = ...) -> None: ...

class fanotify_inode_mark_entry(_message.Message):
    __slots__ = ["f_handle", "i_ino"]
    F_HANDLE_FIELD_NUMBER: _ClassVar[int]
    I_INO_FIELD_NUMBER: _ClassVar[int]
    f_handle: fh_entry
    i_ino: int
    def __init__(self, i_ino: _Optional[int] = ..., f_handle: _Optional[_Union[fh_entry, _Mapping]] = ...) -> None: ...

class fanotify_mark_entry(_message.Message):
    __slots__ = ["id", "ie", "ignored_mask", "mask", "me", "mflags", "s_dev", "type"]
    ID_FIELD_NUMBER: _ClassVar[int]
    IE_FIELD_NUMBER: _ClassVar[int]
    IGNORED_MASK_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    ME_FIELD_NUMBER: _ClassVar[int]
    MFLAGS_FIELD_NUMBER: _ClassVar[int]
    S_DEV_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    id: int
    ie: fanotify_inode_mark_entry
    ignored_mask: int
    mask: int
    me: fanotify_mount_mark_entry
    mflags: int
    s_dev: int
    type: mark_type
    def __init__(self, id: _Optional[int] = ..., type: _Optional[_Union[mark_type, str]] = ..., mflags: _Optional[int] = ..., mask: _Optional[int] = ..., ignored_mask: _Optional[int] = ..., s_dev: _Optional[int] = ..., ie: _Optional[_Union[fanotify_inode_mark_entry, _Mapping]] = ..., me: _Optional[_Union[fanotify_mount_mark_entry, _Mapping]] = ...) -> None: ...

class fanotify_mount_mark_entry(_message.Message):
    __slots__ = ["mnt_id", "path", "raw_path"]
    MNT_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    RAW_PATH_FIELD_NUMBER: _ClassVar[int]
    mnt_id: int
    path: str
    raw_path: bytes
    def __init__(self, mnt_id: _Optional[int] = ..., path: _Optional[str] = ..., raw_path: _Optional[bytes] = ...) -> None: ...

class fanotify_sb_mark_entry(_message.Message):
    __slots__ = ["ignored_mask", "mask", "mflags", "s_dev"]
    IGNORED_MASK_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    MFLAGS_FIELD_NUMBER: _ClassVar[int]
    S_DEV_FIELD_NUMBER: _ClassVar[int]
    ignored_mask: int
    mask: int
    mflags: int
    s_dev: int
    def __init__(self, mflags: _Optional[int] = ..., mask: _Optional[int] = ..., ignored_mask: _Optional[int] = ..., s_dev: _Optional[int] = ...) -> None: ...

class fdinfo_entry(_message.Message):
    __slots__ = ["fd", "flags", "id", "type"]
    FD_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    fd: int
    flags: int
    id: int
    type: fd_types
    def __init__(self, id: _Optional[int] = ..., flags: _Optional[int] = ..., type: _Optional[_Union[fd_types, str]] = ..., fd: _Optional[int] = ...) -> None: ...

class fh_entry(_message.Message):
    __slots__ = ["bytes", "deleted", "handle", "kind", "path", "raw_path", "type"]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    RAW_PATH_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    deleted: bool
    handle: _containers.RepeatedScalarFieldContainer[int]
    kind: handle_kind
    path: str
    raw_path: bytes
    type: int
    def __init__(self, bytes: _Optional[int] = ..., type: _Optional[int] = ..., handle: _Optional[_Iterable[int]] = ..., path: _Optional[str] = ..., kind: _Optional[_Union[handle_kind, str]] = ..., raw_path: _Optional[bytes] = ..., deleted: bool = ...) -> None: ...

class file_entry(_message.Message):
    __slots__ = ["epfd", "ffy", "id", "ify", "type"]
    EPFD_FIELD_NUMBER: _ClassVar[int]
    FFY_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    IFY_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    epfd: eventpoll_file_entry
    ffy: fanotify_file_entry
    id: int
    ify: inotify_file_entry
    type: fd_types
    def __init__(self, type: _Optional[_Union[fd_types, str]] = ..., id: _Optional[int] = ..., epfd: _Optional[_Union[eventpoll_file_entry, _Mapping]] = ..., ify: _Optional[_Union[inotify_file_entry, _Mapping]] = ..., ffy: _Optional[_Union[fanotify_file_entry, _Mapping]] = ...) -> None: ...

class filesystem_entry(_message.Message):
    __slots__ = ["fsid", "fstype", "s_dev", "source"]
    FSID_FIELD_NUMBER: _ClassVar[int]
    FSTYPE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    S_DEV_FIELD_NUMBER: _ClassVar[int]
    fsid: int
    fstype: bytes
    s_dev: int
    source: bytes
    def __init__(self, s_dev: _Optional[int] = ..., fstype: _Optional[bytes] = ..., source: _Optional[bytes] = ..., fsid: _Optional[int] = ...) -> None: ...

class fown_entry(_message.Message):
    __slots__ = ["euid", "pid", "pid_type", "signum", "uid"]
    EUID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PID_TYPE_FIELD_NUMBER: _ClassVar[int]
    SIGNUM_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    euid: int
    pid: int
    pid_type: int
    signum: int
    uid: int
    def __init__(self, uid: _Optional[int] = ..., euid: _Optional[int] = ..., signum: _Optional[int] = ..., pid_type: _Optional[int] = ..., pid: _Optional[int] = ...) -> None: ...

class inotify_file_entry(_message.Message):
    __slots__ = ["flags", "fown", "id", "queue", "wd"]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    FOWN_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    WD_FIELD_NUMBER: _ClassVar[int]
    flags: int
    fown: fown_entry
    id: int
    queue: queue_entry
    wd: _containers.RepeatedCompositeFieldContainer[inotify_wd_entry]
    def __init__(self, id: _Optional[int] = ..., flags: _Optional[int] = ..., fown: _Optional[_Union[fown_entry, _Mapping]] = ..., wd: _Optional[_Iterable[_Union[inotify_wd_entry, _Mapping]]] = ..., queue: _Optional[_Union[queue_entry, _Mapping]] = ...) -> None: ...

class inotify_wd_entry(_message.Message):
    __slots__ = ["f_handle", "i_ino", "id", "ignored_mask", "mask", "s_dev", "wd"]
    F_HANDLE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    IGNORED_MASK_FIELD_NUMBER: _ClassVar[int]
    I_INO_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    S_DEV_FIELD_NUMBER: _ClassVar[int]
    WD_FIELD_NUMBER: _ClassVar[int]
    f_handle: fh_entry
    i_ino: int
    id: int
    ignored_mask: int
    mask: int
    s_dev: int
    wd: int
    def __init__(self, id: _Optional[int] = ..., i_ino: _Optional[int] = ..., mask: _Optional[int] = ..., ignored_mask: _Optional[int] = ..., s_dev: _Optional[int] = ..., wd: _Optional[int] = ..., f_handle: _Optional[_Union[fh_entry, _Mapping]] = ...) -> None: ...

class process_entry(_message.Message):
    __slots__ = ["command", "fdinfo_sha256", "files_sha256", "filesystem", "kernel", "pid"]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    FDINFO_SHA256_FIELD_NUMBER: _ClassVar[int]
    FILESYSTEM_FIELD_NUMBER: _ClassVar[int]
    FILES_SHA256_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    command: bytes
    fdinfo_sha256: bytes
    files_sha256: bytes
    filesystem: _containers.RepeatedCompositeFieldContainer[filesystem_entry]
    kernel: str
    pid: int
    def __init__(self, pid: _Optional[int] = ..., command: _Optional[bytes] = ..., kernel: _Optional[str] = ..., files_sha256: _Optional[bytes] = ..., fdinfo_sha256: _Optional[bytes] = ..., filesystem: _Optional[_Iterable[_Union[filesystem_entry, _Mapping]]] = ...) -> None: ...

class queue_entry(_message.Message):
    __slots__ = ["events", "size"]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    events: bytes
    size: int
    def __init__(self, size: _Optional[int] = ..., events: _Optional[bytes] = ...) -> None: ...

class handle_kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = []

class mark_type(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = []

class fd_types(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = []

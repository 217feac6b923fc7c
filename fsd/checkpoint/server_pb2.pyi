from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Forgotten(_message.Message):
    __slots__ = ["device", "handle", "ino", "name", "nodeid", "parent"]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    INO_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODEID_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    device: _containers.RepeatedScalarFieldContainer[int]
    handle: _containers.RepeatedScalarFieldContainer[bytes]
    ino: _containers.RepeatedScalarFieldContainer[int]
    name: _containers.RepeatedScalarFieldContainer[bytes]
    nodeid: _containers.RepeatedScalarFieldContainer[int]
    parent: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, nodeid: _Optional[_Iterable[int]] = ..., device: _Optional[_Iterable[int]] = ..., ino: _Optional[_Iterable[int]] = ..., handle: _Optional[_Iterable[bytes]] = ..., parent: _Optional[_Iterable[int]] = ..., name: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Guest(_message.Message):
    __slots__ = ["events", "held", "kind", "marks", "missed", "name", "nodes", "outbox", "sent", "token"]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MARKS_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    OUTBOX_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    events: int
    held: HeldEvents
    kind: int
    marks: Marks
    missed: Missed
    name: bytes
    nodes: Nodes
    outbox: OutboxEvents
    sent: int
    token: bytes
    def __init__(self, kind: _Optional[int] = ..., name: _Optional[bytes] = ..., token: _Optional[bytes] = ..., events: _Optional[int] = ..., sent: _Optional[int] = ..., marks: _Optional[_Union[Marks, _Mapping]] = ..., outbox: _Optional[_Union[OutboxEvents, _Mapping]] = ..., held: _Optional[_Union[HeldEvents, _Mapping]] = ..., missed: _Optional[_Union[Missed, _Mapping]] = ..., nodes: _Optional[_Union[Nodes, _Mapping]] = ...) -> None: ...

class HeldEvents(_message.Message):
    __slots__ = ["child", "cookie", "exchanged", "has_self", "mask", "name", "name2", "nlink", "node", "node2", "replaced"]
    CHILD_FIELD_NUMBER: _ClassVar[int]
    COOKIE_FIELD_NUMBER: _ClassVar[int]
    EXCHANGED_FIELD_NUMBER: _ClassVar[int]
    HAS_SELF_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    NAME2_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NLINK_FIELD_NUMBER: _ClassVar[int]
    NODE2_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    REPLACED_FIELD_NUMBER: _ClassVar[int]
    child: _containers.RepeatedScalarFieldContainer[int]
    cookie: _containers.RepeatedScalarFieldContainer[int]
    exchanged: _containers.RepeatedScalarFieldContainer[int]
    has_self: _containers.RepeatedScalarFieldContainer[bool]
    mask: _containers.RepeatedScalarFieldContainer[int]
    name: _containers.RepeatedScalarFieldContainer[bytes]
    name2: _containers.RepeatedScalarFieldContainer[bytes]
    nlink: _containers.RepeatedScalarFieldContainer[int]
    node: _containers.RepeatedScalarFieldContainer[int]
    node2: _containers.RepeatedScalarFieldContainer[int]
    replaced: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, node: _Optional[_Iterable[int]] = ..., mask: _Optional[_Iterable[int]] = ..., name: _Optional[_Iterable[bytes]] = ..., cookie: _Optional[_Iterable[int]] = ..., child: _Optional[_Iterable[int]] = ..., nlink: _Optional[_Iterable[int]] = ..., node2: _Optional[_Iterable[int]] = ..., name2: _Optional[_Iterable[bytes]] = ..., replaced: _Optional[_Iterable[int]] = ..., has_self: _Optional[_Iterable[bool]] = ..., exchanged: _Optional[_Iterable[int]] = ...) -> None: ...

class Inodes(_message.Message):
    __slots__ = ["device", "generation", "handle", "ino", "kind", "name", "nlink", "nodeid", "parent"]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    INO_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NLINK_FIELD_NUMBER: _ClassVar[int]
    NODEID_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    device: _containers.RepeatedScalarFieldContainer[int]
    generation: _containers.RepeatedScalarFieldContainer[int]
    handle: _containers.RepeatedScalarFieldContainer[bytes]
    ino: _containers.RepeatedScalarFieldContainer[int]
    kind: _containers.RepeatedScalarFieldContainer[int]
    name: _containers.RepeatedScalarFieldContainer[bytes]
    nlink: _containers.RepeatedScalarFieldContainer[int]
    nodeid: _containers.RepeatedScalarFieldContainer[int]
    parent: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, nodeid: _Optional[_Iterable[int]] = ..., generation: _Optional[_Iterable[int]] = ..., device: _Optional[_Iterable[int]] = ..., ino: _Optional[_Iterable[int]] = ..., handle: _Optional[_Iterable[bytes]] = ..., kind: _Optional[_Iterable[int]] = ..., nlink: _Optional[_Iterable[int]] = ..., parent: _Optional[_Iterable[int]] = ..., name: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Links(_message.Message):
    __slots__ = ["directory", "name", "nodeid"]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODEID_FIELD_NUMBER: _ClassVar[int]
    directory: _containers.RepeatedScalarFieldContainer[int]
    name: _containers.RepeatedScalarFieldContainer[bytes]
    nodeid: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, directory: _Optional[_Iterable[int]] = ..., name: _Optional[_Iterable[bytes]] = ..., nodeid: _Optional[_Iterable[int]] = ...) -> None: ...

class Marks(_message.Message):
    __slots__ = ["mask", "nodeid"]
    MASK_FIELD_NUMBER: _ClassVar[int]
    NODEID_FIELD_NUMBER: _ClassVar[int]
    mask: _containers.RepeatedScalarFieldContainer[int]
    nodeid: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, nodeid: _Optional[_Iterable[int]] = ..., mask: _Optional[_Iterable[int]] = ...) -> None: ...

class Missed(_message.Message):
    __slots__ = ["before", "directory", "mask", "name", "was_known"]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    WAS_KNOWN_FIELD_NUMBER: _ClassVar[int]
    before: Names
    directory: _containers.RepeatedScalarFieldContainer[int]
    mask: _containers.RepeatedScalarFieldContainer[int]
    name: _containers.RepeatedScalarFieldContainer[bytes]
    was_known: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, directory: _Optional[_Iterable[int]] = ..., name: _Optional[_Iterable[bytes]] = ..., mask: _Optional[_Iterable[int]] = ..., was_known: _Optional[_Iterable[bool]] = ..., before: _Optional[_Union[Names, _Mapping]] = ...) -> None: ...

class Names(_message.Message):
    __slots__ = ["directory", "ino", "kind", "name", "nodeid", "seen_ns"]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    INO_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODEID_FIELD_NUMBER: _ClassVar[int]
    SEEN_NS_FIELD_NUMBER: _ClassVar[int]
    directory: _containers.RepeatedScalarFieldContainer[int]
    ino: _containers.RepeatedScalarFieldContainer[int]
    kind: _containers.RepeatedScalarFieldContainer[int]
    name: _containers.RepeatedScalarFieldContainer[bytes]
    nodeid: _containers.RepeatedScalarFieldContainer[int]
    seen_ns: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, directory: _Optional[_Iterable[int]] = ..., name: _Optional[_Iterable[bytes]] = ..., ino: _Optional[_Iterable[int]] = ..., kind: _Optional[_Iterable[int]] = ..., seen_ns: _Optional[_Iterable[int]] = ..., nodeid: _Optional[_Iterable[int]] = ...) -> None: ...

class Nodes(_message.Message):
    __slots__ = ["count", "nodeid"]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    NODEID_FIELD_NUMBER: _ClassVar[int]
    count: _containers.RepeatedScalarFieldContainer[int]
    nodeid: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, nodeid: _Optional[_Iterable[int]] = ..., count: _Optional[_Iterable[int]] = ...) -> None: ...

class OutboxEvents(_message.Message):
    __slots__ = ["cookie", "generation", "mask", "name", "nodeid"]
    COOKIE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODEID_FIELD_NUMBER: _ClassVar[int]
    cookie: _containers.RepeatedScalarFieldContainer[int]
    generation: _containers.RepeatedScalarFieldContainer[int]
    mask: _containers.RepeatedScalarFieldContainer[int]
    name: _containers.RepeatedScalarFieldContainer[bytes]
    nodeid: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, nodeid: _Optional[_Iterable[int]] = ..., generation: _Optional[_Iterable[int]] = ..., mask: _Optional[_Iterable[int]] = ..., cookie: _Optional[_Iterable[int]] = ..., name: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Server(_message.Message):
    __slots__ = ["file_system", "forgotten", "guests", "inodes", "links", "listed", "names", "root_handle", "root_ino", "saved_ns", "source", "watches"]
    FILE_SYSTEM_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    GUESTS_FIELD_NUMBER: _ClassVar[int]
    INODES_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    LISTED_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    ROOT_HANDLE_FIELD_NUMBER: _ClassVar[int]
    ROOT_INO_FIELD_NUMBER: _ClassVar[int]
    SAVED_NS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    WATCHES_FIELD_NUMBER: _ClassVar[int]
    file_system: int
    forgotten: Forgotten
    guests: _containers.RepeatedCompositeFieldContainer[Guest]
    inodes: Inodes
    links: Links
    listed: _containers.RepeatedScalarFieldContainer[int]
    names: Names
    root_handle: bytes
    root_ino: int
    saved_ns: int
    source: bytes
    watches: Watches
    def __init__(self, source: _Optional[bytes] = ..., root_ino: _Optional[int] = ..., root_handle: _Optional[bytes] = ..., file_system: _Optional[int] = ..., saved_ns: _Optional[int] = ..., inodes: _Optional[_Union[Inodes, _Mapping]] = ..., links: _Optional[_Union[Links, _Mapping]] = ..., watches: _Optional[_Union[Watches, _Mapping]] = ..., listed: _Optional[_Iterable[int]] = ..., names: _Optional[_Union[Names, _Mapping]] = ..., guests: _Optional[_Iterable[_Union[Guest, _Mapping]]] = ..., forgotten: _Optional[_Union[Forgotten, _Mapping]] = ...) -> None: ...

class Watches(_message.Message):
    __slots__ = ["nodeid", "wd"]
    NODEID_FIELD_NUMBER: _ClassVar[int]
    WD_FIELD_NUMBER: _ClassVar[int]
    nodeid: _containers.RepeatedScalarFieldContainer[int]
    wd: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, nodeid: _Optional[_Iterable[int]] = ..., wd: _Optional[_Iterable[int]] = ...) -> None: ...

"""The published test vectors: their sources, and the command that writes them.

    python -m tests.protocol.vectors

writes vectors.json beside this file and the last section of docs/protocol.md. Do that after a
change of the format, and read the difference: it is what other implementations will have to change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from protocol import frames, handles, masks, rfc
from protocol.frames import ALIAS, STAGING, Message, Op, Role
from protocol.handles import NodeKey
from protocol.masks import EVENTS, Mask, MaskError

from . import norm

VECTORS = Path(__file__).with_name("vectors.json")
_BEGIN, _END = "<!-- vectors: begin -->\n", "<!-- vectors: end -->\n"
_WIDTH = 88

REG, DIR, LNK, FIFO = 0o100000, 0o040000, 0o120000, 0o010000
BIG = 0xFEDC_BA98_7654_3210
NO = (0, 0)


def _order(
    seq: int, op: Op, mode: int, node: tuple[int, int], name: bytes, *, path: bytes = b"",
    node2: tuple[int, int] = NO, name2: bytes = b"", path2: bytes = b"", arg: int = 0,
) -> frames.Order:  # fmt: skip
    return frames.Order(seq, op, mode, *node, *node2, arg, name, name2, path, path2)


FRAMES: dict[str, Message] = {
    "hello of an agent": frames.Hello(1, Role.REPLAYER, EVENTS),
    "hello of an observer": frames.Hello(1, Role.OBSERVER, Mask.CREATE | Mask.DELETE),
    "hello for marks by hand": frames.Hello(1, Role.BY_HAND, EVENTS),
    "update of a scan": frames.Update(0, 4711, 0x1234_5678, Mask.MODIFY | Mask.ATTRIB),
    "update, 64-bit nodeid": frames.Update(1, BIG, 0xFFFF_FFFF, EVENTS),
    "update, mark removed": frames.Update(2, 4711, 0x1234_5678, 0),
    "update, whole file system": frames.Update(3, 0, 0, Mask.CREATE | Mask.DELETE),
    "first scan": frames.ScanEnd(0, 1),
    "scan after hint 7": frames.ScanEnd(7, 0),
    "the agent can close alone": frames.ScanEnd(7, 2),
    "traced calls": frames.Calls(7_000_500, 7_002_000),
    "resolve the root": frames.Resolve(4, b""),
    "resolve, not UTF-8": frames.Resolve(5, b"src/caf\xe9"),
    "order failed": frames.Ack(258, 17),
    "ask for statistics": frames.StatsRequest(6),
    "bye": frames.Bye(),
    "keep": frames.Keep(8, 0, b""),
    "come back": frames.Keep(1, 4711, bytes(range(16))),
    "list": frames.List(7, 4711, 0x1234_5678),
    "welcome": frames.Welcome(1, 1, EVENTS),
    "resolved": frames.Result(5, 0, 4711, 0x1234_5678, DIR),
    "update refused": frames.Result(1, 22, BIG, 0xFFFF_FFFF, 0),
    "event with a name": frames.Event(4711, 0x1234_5678, Mask.CREATE | Mask.ISDIR, 0, b"new dir"),
    "event of the object": frames.Event(4711, 0x1234_5678, Mask.DELETE_SELF, 0, b""),
    "event, half of a rename": frames.Event(1, 0, Mask.MOVED_TO, 0x8000_0001, b"b"),
    "create a file": _order(1, Op.CREATE, REG, (1, 0), b"a.txt"),
    "create a symlink": _order(2, Op.CREATE, LNK, (4711, 9), b"l", path=b"src"),
    "remove a directory": _order(3, Op.REMOVE, DIR, (4711, 9), b"d", path=b"src"),
    "rename": _order(
        4, Op.RENAME, REG, (4711, 9), b"old", path=b"src", node2=(4712, 10), name2=b"new",
        path2=b"src/lib",
    ),
    "exchange": _order(
        5, Op.RENAME, REG, (1, 0), b"a", node2=(1, 0), name2=b"b", arg=2
    ),
    "moved out": _order(6, Op.RENAME, REG, (1, 0), b"a", node2=(STAGING, 0), name2=b"x"),
    "moved in": _order(7, Op.RENAME, REG, (STAGING, 0), b"x", node2=(1, 0), name2=b"a"),
    "touch, ATTRIB": _order(8, Op.TOUCH, REG, (1, 0), b"a", arg=Mask.ATTRIB),
    "touch a watched file": _order(9, Op.TOUCH, REG, (ALIAS, 0), b"4711", arg=Mask.MODIFY),
    "open for writing": _order(10, Op.OPEN, REG, (1, 0), b"a", arg=1),
    "open a directory itself": _order(11, Op.OPEN, DIR, (4711, 9), b"", path=b"src"),
    "close": _order(12, Op.CLOSE, REG, (1, 0), b"a", arg=10),
    "close alone": _order(13, Op.LONE_CLOSE, FIFO, (1, 0), b"a", arg=1),
    "hint": frames.Hint(7, 1234),
    "statistics, first part": frames.Stats(6, 1, b'{"pid": '),
    "statistics, last part": frames.Stats(6, 0, b"1}"),
    "directory of a list": frames.Name(7, 1, b"lib"),
    "end of a list": frames.Name(7, 0, b""),
    "kept": frames.Kept(8, bytes(range(16))),
}  # fmt: skip

# What decode() refuses. In a stream some of these are only incomplete, or a frame and a rest.
REFUSED: dict[str, tuple[str, str]] = {
    "half a header": ("08000000 0700", "no whole header"),
    "length 7": ("07000000 0700 00", "less than a header"),
    "length too small": ("08000000 0700 0000 00", "bytes behind the frame"),
    "length too large": ("09000000 0700 0000", "frame is not whole"),
    "length over the limit": ("01000100 0700 0000", "65537 bytes"),
    "length of all ones": ("ffffffff 0700 0000", "4 GiB"),
    "type 0": ("08000000 0000 0000", "unknown type"),
    "type between guest and server": ("08000000 0f00 0000", "unknown type"),
    "type 65535": ("08000000 ffff 0000", "unknown type"),
    "reserved field": ("08000000 0700 0100", "reserved field is not 0"),
    "bye with a body": ("09000000 0700 0000 00", "a byte too many"),
    "hello, a byte short": ("13000000 0100 0000 0100 0100 ff0f0000000000", "truncated"),
    "hello, a byte more": ("15000000 0100 0000 0100 0100 ff0f000000000000 00", "a byte too many"),
    "resolve without a path": ("0c000000 0400 0000 01000000", "no length of the path"),
    "resolve, half a length": ("0d000000 0400 0000 01000000 00", "half a length"),
    "resolve, path cut": ("0f000000 0400 0000 01000000 0200 61", "path of 2 bytes, 1 there"),
    "resolve, more than the path": ("0f000000 0400 0000 01000000 0000 61", "a byte too many"),
    "big-endian bye": ("00000008 0007 0000", "length of 128 MiB"),
}

RFC: dict[str, tuple[str, NamedTuple]] = {
    "v1 add": ("v1 request", rfc.RequestV1(Mask.CREATE | Mask.DELETE, BIG, rfc.ACTION_ADD)),
    "v1 remove": ("v1 request", rfc.RequestV1(0, 1, rfc.ACTION_REMOVE)),
    "v1 event": ("v1 event", rfc.EventV1(BIG, Mask.CREATE, 0, b"name of 16 bytes")),
    "v1 rename": ("v1 event", rfc.EventV1(1, Mask.MOVED_FROM, 0x0102_0304, b"caf\xe9")),
    "v1 event without a name": ("v1 event", rfc.EventV1(4711, Mask.DELETE_SELF, 0, b"")),
    "v2 set": ("v2 request", rfc.RequestV2(EVENTS)),
    "v2 remove": ("v2 request", rfc.RequestV2(0)),
    "v2 event": ("v2 event", rfc.EventV2(BIG, BIG - 1, Mask.MODIFY, 0xFFFF_FFFF, True, b"a.txt")),
    "v2 event without a name": (
        "v2 event",
        rfc.EventV2(4711, 0, Mask.ATTRIB, 0x1234_5678, False, b""),
    ),
}
RFC_ENCODE: dict[str, Callable[[Any], bytes]] = {
    "v1 request": rfc.encode_request_v1,
    "v1 event": rfc.encode_event_v1,
    "v2 request": rfc.encode_request_v2,
    "v2 event": rfc.encode_event_v2,
}

HANDLES: dict[str, NodeKey] = {
    "root": NodeKey(1, 0),
    "low half": NodeKey(4711, 0x1234_5678),
    "64-bit nodeid": NodeKey(BIG, 0xFFFF_FFFF),
}

MASKS: dict[str, int] = {
    "nothing": 0,
    "all events": EVENTS,
    "kernel's own bits": EVENTS | Mask.ONESHOT | Mask.EXCL_UNLINK | Mask.EVENT_ON_CHILD,
    "IGNORED alone": Mask.IGNORED,
    "UNMOUNT and CREATE": Mask.UNMOUNT | Mask.CREATE,
    "ONESHOT alone": Mask.ONESHOT,
    "ISDIR alone": Mask.ISDIR,
    "unknown bit": 0x1000,
    "unknown bit beside an event": 0x1101,
    "bit 63": 1 << 63,
}


def _fields(message: NamedTuple) -> dict[str, int | str]:
    return {
        name: value.hex() if isinstance(value, bytes) else int(value)
        for name, value in message._asdict().items()
    }


def _mask_result(bits: int) -> int | None:
    try:
        return int(masks.requested(bits))
    except MaskError:
        return None


def generate() -> dict[str, Any]:
    """What vectors.json holds. Bytes are in hex; ``result`` null is EINVAL."""
    return {
        "version": frames.VERSION,
        "frames": [
            {
                "name": name,
                "message": type(message).__name__,
                "fields": _fields(message),
                "hex": frames.encode(message).hex(),
            }
            for name, message in FRAMES.items()
        ],
        "refused": [
            {"name": name, "why": why, "hex": bytes.fromhex(data).hex()}
            for name, (data, why) in REFUSED.items()
        ],
        "rfc": [
            {
                "name": name,
                "layout": layout,
                "fields": _fields(message),
                "hex": RFC_ENCODE[layout](message).hex(),
            }
            for name, (layout, message) in RFC.items()
        ],
        "handles": [
            {
                "name": name,
                "type": handles.FILEID_INO64_GEN,
                "fields": _fields(key),
                "hex": handles.encode_fh(key).hex(),
            }
            for name, key in HANDLES.items()
        ],
        "masks": [
            {"name": name, "requested": int(bits), "result": _mask_result(bits)}
            for name, bits in MASKS.items()
        ],
    }


def load() -> dict[str, Any]:
    """vectors.json as it is published."""
    vectors: dict[str, Any] = json.loads(VECTORS.read_text())
    return vectors


def text(vectors: dict[str, Any]) -> str:
    """The file's text: a vector a line, so that differences are readable."""
    parts = [f'"version": {vectors["version"]}']
    for key, rows in vectors.items():
        if isinstance(rows, list):
            lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
            parts.append(f'"{key}": [\n{lines}\n ]')
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def section(vectors: dict[str, Any]) -> str:
    """The same for people: the last section of docs/protocol.md, between its two markers."""
    lines: list[str] = []

    def vector(head: str, data: str) -> None:
        lines.append(head)
        lines.extend(f"    {data[i : i + _WIDTH]}" for i in range(0, len(data), _WIDTH))

    for title, kind, rows in (
        ("Frames", "message", vectors["frames"]),
        ("RFC layouts", "layout", vectors["rfc"]),
        ("Handles of type 0x81, on a little-endian machine", "", vectors["handles"]),
    ):
        lines += [f"### {title}", "", "```"]
        for row in rows:
            fields = [f"{name}={_shown(name, v)}" for name, v in row["fields"].items() if v]
            words = [row[kind]] if kind else []
            vector(" ".join([f"{row['name']}:", *words, *fields]), row["hex"])
        lines += ["```", ""]
    lines += ["### Refused, each as one frame", "", "```"]
    for row in vectors["refused"]:
        vector(f"{row['name']}: {row['why']}", row["hex"])
    lines += ["```", "", "### Masks of an Update", "", "| | mask | becomes |", "|---|---|---|"]
    for row in vectors["masks"]:
        result = "EINVAL" if row["result"] is None else f"{row['result']:#x}"
        lines.append(f"| {row['name']} | {row['requested']:#x} | {result} |")
    return "\n".join(["", *lines, "", ""])


def _shown(name: str, value: int | str) -> str:
    if isinstance(value, str):
        return repr(bytes.fromhex(value))
    if name == "mode":
        return f"{value:#o}"
    if name in ("mask", "events", "generation", "generation2") or value >= 1 << 63:
        return f"{value:#x}"
    return str(value)


def split_document() -> tuple[str, str, str]:
    """docs/protocol.md: before the vectors, the vectors, after them."""
    before, begin, rest = norm.DOCUMENT.read_text().partition(_BEGIN)
    inside, end, after = rest.partition(_END)
    if not begin or not end:
        raise SystemExit(f"{norm.DOCUMENT}: the markers of the vectors are missing")
    return before + begin, inside, end + after


def main() -> None:
    """Write both."""
    vectors = generate()
    VECTORS.write_text(text(vectors))
    before, _, after = split_document()
    norm.DOCUMENT.write_text(before + section(vectors) + after)


if __name__ == "__main__":
    main()

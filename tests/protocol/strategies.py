"""Messages for property tests, made from the field tables of docs/protocol.md."""

from __future__ import annotations

from typing import get_args

from hypothesis import strategies as st

from protocol.frames import Message

from . import norm

CLASSES: dict[str, type[Message]] = {cls.__name__: cls for cls in get_args(Message)}
CODES = {layout.title: code for code, layout in norm.messages().items()}


def make(name: str, values: dict[str, norm.Value]) -> Message:
    """The message of that name."""
    return CLASSES[name](**values)  # type: ignore[arg-type]


def values_of(message: Message) -> dict[str, norm.Value]:
    """Its fields by name."""
    values: dict[str, norm.Value] = message._asdict()
    return values


def limit(kind: str) -> int:
    """The largest value of an integer field."""
    return (1 << 8 * norm.SIZES[kind]) - 1


def integers(kind: str) -> st.SearchStrategy[int]:
    """Any value of an integer field, the edges often."""
    top = limit(kind)
    return st.sampled_from([0, 1, top >> 1, (top >> 1) + 1, top]) | st.integers(0, top)


def field(kind: str) -> st.SearchStrategy[norm.Value]:
    """Any value of a field; four of the bytes fields at their longest here fit in a frame."""
    return st.binary(max_size=300) if kind == "bytes" else integers(kind)


def _of(layout: norm.Layout) -> st.SearchStrategy[Message]:
    fields = {row.name: field(row.kind) for row in layout.fields}
    return st.fixed_dictionaries(fields).map(lambda values: make(layout.title, values))


MESSAGES: st.SearchStrategy[Message] = st.one_of([_of(m) for m in norm.messages().values()])

# Bytes with a true header, so that a body is looked at.
FRAMED: st.SearchStrategy[bytes] = st.builds(
    lambda code, body: (8 + len(body)).to_bytes(4, "little") + code.to_bytes(4, "little") + body,
    st.sampled_from(sorted(CODES.values())),
    st.binary(max_size=120),
)

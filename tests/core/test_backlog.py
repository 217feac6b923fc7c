"""The backlog's renames: what it finds and takes, compared with a plain list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fsd.events.backlog import Backlog
from fsd.events.event import HOST
from protocol.inotify import RawEvent
from protocol.masks import Mask

MOVED_TO = int(Mask.MOVED_TO)
MASKS = (int(Mask.MOVED_FROM), MOVED_TO, int(Mask.CREATE))
EVENTS = st.lists(st.tuples(st.sampled_from(MASKS), st.integers(1, 4)), max_size=30)
STEPS = st.lists(
    st.tuples(st.sampled_from(["pop", "take", "drop", "discard", "push"]), st.integers(1, 4)),
    max_size=20,
)


def raw(mask: int, cookie: int, wd: int = 1) -> RawEvent:
    return RawEvent(wd, mask, 0 if mask == int(Mask.CREATE) else cookie, b"x")


@given(EVENTS, STEPS, st.integers(1, 30))
def test_halves_of_renames(
    events: list[tuple[int, int]], steps: list[tuple[str, int]], within: int
) -> None:
    backlog, model = Backlog(), [raw(*event, wd=number % 3) for number, event in enumerate(events)]
    for event in model:
        assert backlog.push(event, HOST, 0.0)
    for step, cookie in steps:
        ahead = model[:within]
        found = [e for e in ahead if e.cookie == cookie and e.mask & MOVED_TO]
        assert backlog.has_moved_to(cookie, within) is bool(found)
        match step:
            case "pop" if model:
                assert backlog.pop().raw is model.pop(0)
            case "take":
                taken = backlog.take_moved_to(cookie, within)
                assert (taken and taken.raw) is (found[0] if found else None)
                if found:
                    del model[next(i for i, e in enumerate(model) if e is found[0])]
            case "drop":
                backlog.drop_rename(cookie, within)
                model = [e for e in ahead if e.cookie != cookie] + model[within:]
            case "discard":
                backlog.discard({cookie % 3})
                model = [e for e in model if e.wd != cookie % 3]
            case "push":
                model.append(raw(MOVED_TO, cookie))
                backlog.push(model[-1], HOST, 0.0)
        assert [arrival.raw for arrival in backlog.peek(100)] == model

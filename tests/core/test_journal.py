"""The journal: what is written is there for the next process, whenever this one ends."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from fsd.process import journal
from fsd.process.journal import Journal, JournalError, Record


@pytest.fixture
def fresh() -> Iterator[Journal]:
    made = Journal()
    yield made
    made.close()


def reopened(old: Journal) -> Journal:
    return Journal(os.dup(old.fd))


def test_what_was_written_is_there(fresh: Journal) -> None:
    fresh.put(1, 7, b"seven")
    fresh.put(1, 8, b"", 3)
    fresh.put(2, 7, b"x" * 5000)
    fresh.put(1, 7, b"seven again", 2)
    fresh.count(1, 8, 4)
    fresh.remove(2, 7)
    fresh.remove(2, 7)
    next_one = reopened(fresh)
    assert next_one.records == {(1, 8): Record(b"", 4), (1, 7): Record(b"seven again", 2)}
    next_one.put(3, 1, b"more")
    next_one.close()
    last = reopened(fresh)
    assert list(last.records) == [(1, 8), (1, 7), (3, 1)]
    last.close()


def test_any_end_of_the_file_is_an_end(fresh: Journal) -> None:
    """A record that was cut off, or is not what was written, is not there; what is before it is."""
    fresh.put(1, 1, b"first")
    fresh.put(1, 2, b"second, and longer")
    whole = os.fstat(fresh.fd).st_size
    content = os.pread(fresh.fd, whole, 0)
    both = reopened(fresh).records
    assert len(both) == 2
    for size in range(4096, whole):
        os.ftruncate(fresh.fd, 0)
        os.pwrite(fresh.fd, content[:size], 0)
        cut = reopened(fresh)
        assert list(cut.records) in ([], [(1, 1)]), size
        cut.put(9, 9, b"continues")
        cut.close()
        again = reopened(fresh)
        assert (9, 9) in again.records
        again.close()


def test_removed_records_take_no_room(fresh: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "COMPACT_FROM", 1 << 14)
    chance = random.Random(4)
    expected: dict[tuple[int, int], Record] = {}
    for step in range(20_000):
        key = (1, chance.randrange(50))
        if chance.random() < 0.3:
            fresh.remove(*key)
            expected.pop(key, None)
        else:
            value = chance.randbytes(chance.randrange(100))
            fresh.put(*key, value, step + 1)
            expected[key] = Record(value, step + 1)
    assert os.fstat(fresh.fd).st_blocks * 512 < 1 << 16
    last = reopened(fresh)
    assert last.records == expected
    last.close()
    for _ in range(3):
        fresh.clear()
        last = reopened(fresh)
        assert not last.records
        last.close()
        fresh.put(1, 1, b"after")


def test_what_is_no_journal(fresh: Journal) -> None:
    os.pwrite(fresh.fd, b"another version", 0)
    with pytest.raises(JournalError):
        reopened(fresh)
    os.ftruncate(fresh.fd, 3)
    with pytest.raises(JournalError):
        reopened(fresh)

"""A native directory and a mounted one side by side, for modules with many short tests: a mount
for each test would cost more than the tests.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from harness.mounts import Mount, mounted


class Sides:
    """The two directories, in a place that every user can reach (pytest's own temporary
    directories are private). A mount that a test has brought down is made again for the next."""

    def __init__(self, base: Path, *options: str) -> None:
        self._options = options
        base.chmod(0o755)
        self.native, self._source, self._mountpoint = (
            base / name for name in ("native", "source", "mount")
        )
        for path in (self.native, self._source, self._mountpoint):
            path.mkdir()
            path.chmod(0o755)
        self._stack = ExitStack()
        self._mount: Mount | None = None
        self._starts = True

    @property
    def mount(self) -> Mount:
        assert self._starts, "the mount cannot be made: see the first test that needed it"
        if self._mount is None:
            self._starts = False
            self._mount = self._stack.enter_context(
                mounted(self._source, self._mountpoint, *self._options)
            )
            self._starts = True
        return self._mount

    def check_alive(self) -> None:
        """Blame a server that has ended on the test that calls this."""
        if self._mount is not None and self._mount.process.poll() is not None:
            self.close()  # says why it ended
            raise AssertionError("the server ended without a reason")

    def close(self) -> None:
        stack, self._stack, self._mount = self._stack, ExitStack(), None
        stack.close()


@contextmanager
def two_sides(*options: str) -> Iterator[Sides]:
    """``options`` are those of `fsd mount`."""
    if not Path("/dev/fuse").exists():
        pytest.skip("there is no /dev/fuse: nothing can be mounted")
    with tempfile.TemporaryDirectory(prefix="fsd-sides-") as base:
        sides = Sides(Path(base), *options)
        try:
            yield sides
        finally:
            sides.close()

"""Fuzzes one target with libFuzzer, guided by the coverage of fsd and protocol.

    python -m tests.fuzz.run TARGET [libFuzzer's arguments and corpus directories]

Ends with 0 when its time is over; what breaks a promise, or takes longer than -timeout, is written
to a file, which `python -m tests.fuzz.run TARGET FILE` does again.
"""

from __future__ import annotations

import os
import sys

import atheris
import structlog

with atheris.instrument_imports(include=["fsd", "protocol"]):
    from tests.fuzz.targets import TARGETS

OPTIONS = (
    "-timeout=10",
    "-max_len=600",
    "-len_control=0",
    "-rss_limit_mb=1024",
    "-handle_xfsz=0",
    "-verbosity=0",
)
"""A request takes microseconds: ten seconds are a hang."""


def main() -> None:
    name, *arguments = sys.argv[1:]
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    program = os.environ.get("FSD_FUZZ_PROGRAM", sys.argv[0])  # -merge starts it again
    atheris.Setup([program, *OPTIONS, *arguments], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""A program that looks at a file as soon as it learns that the file changed, as build tools do.

It prints READY, then for every event a JSON line [mask, name, count, seen]: `count` is how often
this (mask, name) has come, `seen` what is there now: null if nothing, {error}, or else
{mode, mtime, text}. Arguments: the directory, the mask. It ends on SIGTERM.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections import Counter

from tests.fidelity.watcher import Watcher, parse, wakeup


def look(path: bytes) -> dict[str, int | str] | None:
    try:
        info = os.lstat(path)
        text = b""
        if stat.S_ISLNK(info.st_mode):
            text = os.readlink(path)
        elif stat.S_ISREG(info.st_mode):
            with open(path, "rb", buffering=0) as file:
                text = file.read(1 << 20) or b""
    except FileNotFoundError:
        return None
    except OSError as error:
        return {"error": str(error)}
    return {"mode": info.st_mode, "mtime": int(info.st_mtime), "text": text.decode("latin-1")}


def main() -> None:
    directory, mask = os.fsencode(sys.argv[1]), int(sys.argv[2], 0)
    wake = wakeup()
    for name in os.listdir(directory):
        look(os.path.join(directory, name))  # what is cached now must not be seen later
    watcher = Watcher()
    watcher.add(directory, mask, ".")
    print("READY", flush=True)
    counts: Counter[tuple[int, bytes]] = Counter()
    while (data := watcher.read(wake, None)) is not None:
        for _, kind, _, name in parse(data):
            seen = look(os.path.join(directory, name))
            counts[kind, name] += 1
            line = [kind, name.decode("latin-1"), counts[kind, name], seen]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

"""watchdog polling with its default interval. Usage: poll_watchdog.py DIRECTORY"""

from __future__ import annotations

import os
import sys
import time

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers.polling import PollingObserver


class Printer(FileSystemEventHandler):
    """Prints each change with its time."""

    def on_modified(self, event: FileSystemEvent) -> None:
        """Called in the observer's thread."""
        if not event.is_directory:
            print(time.monotonic_ns(), os.fsdecode(event.src_path), flush=True)


observer = PollingObserver()
observer.schedule(Printer(), sys.argv[1], recursive=True)
observer.start()
print("READY", flush=True)
observer.join()

"""watchdog's InotifyObserver on ROOT: one JSON line an event (``--text``: with the content)."""

import json
import sys
from contextlib import suppress
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers.inotify import InotifyObserver


class Printer(FileSystemEventHandler):
    def on_any_event(self, event: FileSystemEvent) -> None:
        # Reading the file opens and closes it again: without this, an event would beget events.
        if event.event_type in ("opened", "closed_no_write"):
            return
        path = Path(str(event.src_path))
        text = None
        if "--text" in sys.argv and event.event_type in ("created", "modified", "closed"):
            with suppress(OSError):
                text = path.read_text()
        line = {"event": event.event_type, "path": str(path), "text": text}
        if event.dest_path:
            line["dest"] = str(event.dest_path)
        print(json.dumps(line), flush=True)


observer = InotifyObserver()
observer.schedule(Printer(), sys.argv[1], recursive=True)
# Before the start: from then on the observer's thread prints. A test has to look at the marks.
print(json.dumps({"ready": True}), flush=True)
observer.start()
observer.join()

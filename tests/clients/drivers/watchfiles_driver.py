"""watchfiles on ROOT, polling off: one JSON line a change (``--text``: with the content)."""

import json
import sys
from pathlib import Path

from watchfiles import Change, watch

# The marks are set in the first step of the iterator: a test must look at the marks.
print(json.dumps({"ready": True}), flush=True)
for changes in watch(sys.argv[1], watch_filter=None, force_polling=False, debounce=100, step=20):
    for change, path in changes:
        text = None
        if "--text" in sys.argv and change is not Change.deleted and Path(path).is_file():
            text = Path(path).read_text()
        print(json.dumps({"event": change.name, "path": path, "text": text}), flush=True)

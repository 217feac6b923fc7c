"""A watcher's own state: saved, shown, restored, and beside what CRIU makes of it."""

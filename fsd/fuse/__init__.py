"""One guest's FUSE requests, as raw messages."""

"""One guest's FUSE session: raw requests in, raw replies out."""

"""The server: an export, its guests, the host watcher and the transports."""

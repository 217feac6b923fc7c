"""The server: one Export, its guests, the host watcher, the transports."""

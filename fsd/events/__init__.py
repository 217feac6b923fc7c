"""Turns the host's inotify queue into events: what happened, and to which object."""

"""From the host's inotify queue to what happened, and to which object."""

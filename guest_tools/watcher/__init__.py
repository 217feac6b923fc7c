"""A watcher's own state, inotify, fanotify and epoll: saved, shown and made again."""

"""The inotify, fanotify and epoll state of a process: saved, shown and made again."""

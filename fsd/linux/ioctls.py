"""Numbers of ioctl(2) that fsd uses: of inotify, and of files' flags.

Apart from their users because the filter of system calls allows exactly these.
"""

from __future__ import annotations

FIONREAD = 0x541B
SETNEXTWD = 0x4004_4900
"""INOTIFY_IOC_SETNEXTWD of <linux/inotify.h>: the number of the next watch, if it is free."""
INOTIFY = (FIONREAD, SETNEXTWD)
"""Requests to an inotify instance."""
BACKING_OPEN, BACKING_CLOSE = 0x4010_E501, 0x4004_E502
"""FUSE_DEV_IOC_BACKING_OPEN and _CLOSE of <linux/fuse.h>, to /dev/fuse: for ``fsd mount`` only."""
GETFLAGS, SETFLAGS, GETVERSION = 0x8008_6601, 0x4008_6602, 0x8008_7601
FSGETXATTR, FSSETXATTR = 0x801C_581F, 0x401C_5820
FILES = {GETFLAGS: 8, SETFLAGS: 8, GETVERSION: 8, FSGETXATTR: 28, FSSETXATTR: 28}
"""Requests that guests may make to a file's file system: number and bytes of the argument. That of
FLAGS and VERSION is an int, though its number says long."""

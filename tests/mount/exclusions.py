"""What the mount cannot do, one case a line with its reason. The tests run these cases all the
same and fail when one starts to pass: then its line has to go.
"""

# POSIX cases (posix_*.py) that a mount over libfuse fails; over /dev/fuse there is none.
LIBFUSE: dict[str, str] = {
    "open_tmpfile": "pyfuse3 has no handler for FUSE_TMPFILE (libfuse 3.14 neither)",
    "size_fallocate": "pyfuse3 has no handler for FUSE_FALLOCATE",
    "size_punch_hole": "pyfuse3 has no handler for FUSE_FALLOCATE",
    "size_seek_hole": "pyfuse3 has no handler for FUSE_LSEEK: the kernel takes all for data",
    "ioctl_get_flags": "pyfuse3 has no handler for FUSE_IOCTL",
    "acl_default_replaces_the_umask": "pyfuse3 cannot ask the kernel for FUSE_DONT_MASK",
    "append_from_now_on": "pyfuse3 passes no descriptor's flags on at WRITE, only at OPEN",
    "host_lock_is_seen": "pyfuse3 has no handler for locks: they are the guest kernel's own",
}

# stress-ng stressors that cannot do their work on a mount and can natively.
STRESSORS: dict[str, str] = {
    "fiemap": "the kernel answers FS_IOC_FIEMAP by an operation that FUSE does not have",
}

# POSIX cases that an ordinary user's mount fails.
ORDINARY: dict[str, str] = {}

# POSIX cases that a guest with Linux 6.1 fails on a virtiofs share.
GUEST: dict[str, str] = {
    "times_now_and_omit": "the host's clock stamps files, the guest's is another",
    "xattr_trusted": "the sandbox gives up CAP_SYS_ADMIN, as virtiofsd's does; "
    "--modcaps=+sys_admin keeps it",
    "sgid_directory_passes_its_group_on": "before Linux 6.3 a guest does not say in which groups "
    "its caller is (FUSE_CREATE_SUPP_GROUP): a member counts as none",
}

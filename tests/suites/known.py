"""What the suites may fail, one test a line with its reason."""

# On a bind mount, too.
NATIVELY: dict[str, dict[str, str]] = {
    "inotify-tools": {
        "fsnotifywait-subtree 3: event logged": "it mounts a file system on the mount and changes "
        "what is in it: the library has that changed in the source, which is another place",
    },
}

# On fsd alone; each is a row of README's table.
ON_FSD: dict[str, dict[str, str]] = {
    "entr": {
        "80 ensure watches operate on a running executable": "a program that runs in the guest is "
        "written by the host; the guest's kernel lets nobody open it for writing (ETXTBSY)",
    },
}

# On fsd at times, but not with --cache=never; a row of README's table, too.
AT_ONCE = (
    "a file is made on the host, and looked for through the mount in the millisecond in which the "
    "kernel still keeps that there is none"
)
ON_FSD_AT_TIMES: dict[str, dict[str, str]] = {
    "watchfiles": {
        "tests/test_run_process.py::test_run_function": AT_ONCE,
        "tests/test_run_process.py::test_run_function_tty": AT_ONCE,
    },
}

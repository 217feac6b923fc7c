"""`fsd virtiofs` and `fsd-virtiofsd` as people, libvirt and service managers call them."""

from __future__ import annotations

import array
import itertools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import click
import pytest

from fsd.cli.virtiofs import _FLAGS, _REFUSED, virtiofs
from fsd.transports.polling import PROCESSORS
from harness.fuse_driver import Driver
from harness.mounts import STOP_TIMEOUT, await_ready, command, wait_until
from harness.namespace import as_user, private, python_of_everybody, run
from harness.share_server import inside
from harness.vhost_frontend import Frontend
from protocol import fuse
from protocol.fuse import Init, Opcode
from protocol.vhostuser import Config, Protocol, Type

PLACES = ["--shared-dir=/tmp", "--socket-path=/s"]
FSD, DAEMON = command("fsd"), command("fsd-virtiofsd")
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, which only root can")


@pytest.fixture
def top() -> Iterator[Path]:
    """A directory with a short path (sockets), and a share in it."""
    with tempfile.TemporaryDirectory(prefix="fsd-vm-") as top:
        Path(top, "share").mkdir()
        yield Path(top)


def refused(done: subprocess.CompletedProcess[str], says: str, *, status: int = 1) -> None:
    """One clear line, the exit status, no words on stdout."""
    assert done.returncode == status, done
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fsd: ")
    assert says in lines[0]


@contextmanager
def server(*arguments: str | Path, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is ready, for the block."""
    process = subprocess.Popen(
        [DAEMON, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # type: ignore[call-overload]  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        first = await_ready(process, process.stdout)
        assert first.startswith("fsd: ready: "), (first, process.stderr.read())
        yield process
    finally:
        process.kill()
        process.wait(STOP_TIMEOUT)
        process.stdout.close()
        process.stderr.close()


def stopped(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> int:
    """The exit status after a signal."""
    process.send_signal(number)
    return process.wait(STOP_TIMEOUT)


def features(connection: socket.socket) -> bytes:
    """The answer to VHOST_USER_GET_FEATURES: a server is there, and takes us for a VMM."""
    connection.settimeout(10)
    connection.sendall(array.array("I", [1, 1, 0]).tobytes())
    return connection.recv(64)


def connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(os.fspath(path))
    return connection


# What it reports about itself


@pytest.mark.parametrize("name", [[DAEMON], [FSD, "virtiofs"]])
def test_capabilities(name: list[Path]) -> None:
    """What libvirt reads: of separate-options it concludes that it need not use -o."""
    done = run([*name, "--print-capabilities"])
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"type": "fs", "features": ["separate-options"]}


def test_version() -> None:
    done = run([DAEMON, "--version"])
    assert (done.returncode, done.stdout.split()[0]) == (0, "fsd-virtiofsd,")
    assert run([DAEMON, "-V"]).stdout == done.stdout


# Wrong usage


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--shared-dir is missing"),
        (["--shared-dir=/tmp"], "--socket-path, --fd or a socket from systemd is missing"),
        (["--shared-dir=/tmp", "--socket-path="], "the path is empty"),
        (["--shared-dir=/tmp", "--socket-path=/s", "--fd=3"], "cannot be used together"),
        (["--shared-dir=/tmp", "--fd=3", "--socket-group=root"], "cannot be used together"),
        (["--shared-dir=/tmp", "--socket-path=/s", "--socket-path=/s"], "given twice"),
        (["--shared-dir=/tmp", "--socket-path=/s", "--tag=" + 37 * "x"], "at most 36 bytes"),
        (["--cache=sometimes"], "--cache"),
        (["--sandbox=jail"], "--sandbox"),
        (["--inode-file-handles=yes"], "--inode-file-handles"),
        (["--rlimit-nofile=-1"], "--rlimit-nofile"),
        (["--thread-pool-size=many"], "--thread-pool-size"),
        (["--busy-poll=-1"], "--busy-poll"),
        (["--log-level=loud"], "--log-level"),
        (["--shared-dir=/tmp", "--socket-path=/s", "--modcaps=+flying"], "--modcaps"),
        (["--no-such-option"], "--no-such-option"),
        (["-o", "no_such_option"], "-o no_such_option"),
        (["-o", "cache=sometimes"], "cache is one of"),
        (["-o", "xattrmap=:map::user.x.:"], "-o xattrmap"),
        (["-o", "writeback"], "-o writeback"),
        (["--shared-dir=/tmp", "--socket-path=/s", "-o", "flock"], "give both or neither"),
        (["--announce-submounts", "--no-announce-submounts", *PLACES], "cannot be used together"),
    ],
)
def test_wrong_usage(arguments: list[str], says: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        virtiofs.main(arguments, standalone_mode=False)
    assert says in caught.value.format_message()


def test_wrong_usage_is_one_line(top: Path) -> None:
    refused(run([DAEMON, "--no-such-option"]), "; see 'fsd-virtiofsd --help'", status=2)
    refused(run([FSD, "virtiofs"]), "; see 'fsd virtiofs --help'", status=2)


@pytest.mark.parametrize("option", _REFUSED)
def test_what_is_not_honoured_is_refused(option: str) -> None:
    arguments = [option] if option in _FLAGS else [option, "x"]
    with pytest.raises(click.UsageError, match="is not supported: "):
        virtiofs.main(arguments, standalone_mode=False)


# What cannot be shared, or not there


def test_bad_directory(top: Path) -> None:
    (top / "file").touch()
    (top / "loop").symlink_to("loop")
    for name, says in (
        ("no", "no does not exist"),
        ("file", "file is not a directory"),
        ("loop", "loop"),
    ):
        refused(run([DAEMON, f"--shared-dir={top / name}", f"--socket-path={top / 's'}"]), says)
        assert not (top / "s").exists()


def test_no_permission(top: Path, tmp_path: Path) -> None:
    top.chmod(0o755)
    (top / "share").chmod(0o700)
    (top / "mine").mkdir()
    (top / "mine").chmod(0o777)
    (top / "free").mkdir()
    setup = python_of_everybody(tmp_path)

    def user(share: str, path: str, *more: str) -> subprocess.CompletedProcess[str]:
        arguments = [f"--shared-dir={top / share}", f"--socket-path={top / path}", *more]
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        lines = setup.replace(str(tmp_path), str(directory)) if setup else ":"
        for line in lines.split("\n"):
            if line.startswith("mount --bind ") and str(directory) in line.split()[3]:
                Path(line.split()[3]).mkdir(exist_ok=True)
        return run(private(lines, *as_user(), DAEMON, *arguments))

    refused(user("share", "mine/s"), "share: no permission to read it")
    refused(user("free", "s"), "s: Permission denied")
    refused(user("free", "mine/s", "--sandbox=chroot"), "--sandbox=chroot needs root")


def test_socket_in_the_way(top: Path) -> None:
    arguments: list[str | Path] = [
        DAEMON, f"--shared-dir={top / 'share'}", f"--socket-path={top / 's'}"
    ]  # fmt: skip
    (top / "s").write_text("mine")
    refused(run(arguments), "s: another server listens there, or a file that is not a socket")
    assert (top / "s").read_text() == "mine"
    refused(run([*arguments[:2], f"--socket-path={top / 'no' / 's'}"]), "No such file")
    refused(run([*arguments[:2], f"--socket-path={top / (120 * 'x')}"]), "too long")


def test_no_such_group(top: Path) -> None:
    done = run([
        DAEMON, f"--shared-dir={top / 'share'}", f"--socket-path={top / 's'}", "--socket-group=nix",
    ])  # fmt: skip
    refused(done, "there is no group nix")
    assert not (top / "s").exists()


def test_descriptors_that_are_no_sockets(top: Path) -> None:
    with (top / "file").open("w") as file:
        for fd, says in ((file.fileno(), "is not a socket"), (999, "Bad file descriptor")):
            done = subprocess.run(
                [DAEMON, f"--shared-dir={top / 'share'}", f"--fd={fd}"], pass_fds=[file.fileno()],
                capture_output=True, text=True, timeout=30, check=False,
            )  # fmt: skip
            refused(done, f"--fd={fd}")
            assert says in done.stderr


def test_file_handles_that_cannot_be_had(top: Path) -> None:
    """proc has none."""
    done = run([
        DAEMON, "--shared-dir=/proc/self/fdinfo", f"--socket-path={top / 's'}", "--sandbox=none",
        "--inode-file-handles=mandatory",
    ])  # fmt: skip
    refused(done, "--inode-file-handles=mandatory")


# Sockets


def test_a_socket_is_its_owner_s_and_gone_at_the_end(top: Path) -> None:
    path = top / "s"
    with server(f"--shared-dir={top / 'share'}", f"--socket-path={path}") as process:
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, 0)
        assert stopped(process) == 0
    assert not path.exists()


def test_socket_group(top: Path) -> None:
    path = top / "s"
    arguments = [f"--shared-dir={top / 'share'}", f"--socket-path={path}"]
    with server(*arguments, "--socket-group=daemon") as process:
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, 1)
        assert stopped(process) == 0


def test_stale_and_busy_socket(top: Path) -> None:
    path = top / "s"
    arguments = [f"--shared-dir={top / 'share'}", f"--socket-path={path}"]
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    with server(*arguments) as process:
        refused(run([DAEMON, *arguments]), "s: another server listens there")
        with connected(path) as vmm:  # the first one continues
            assert len(features(vmm)) == 20
        assert stopped(process) == 0


@pytest.mark.parametrize("mode", ["namespace", "chroot", "none"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_clean_stop(top: Path, mode: str, number: int) -> None:
    """With a VMM on one of two sockets. Another VMM could come after it."""
    paths = [top / "one", top / "two"]
    sockets = [f"--socket-path={path}" for path in paths]
    with server(f"--shared-dir={top / 'share'}", *sockets, f"--sandbox={mode}") as process:
        for _ in range(2):
            with connected(paths[0]) as vmm:
                assert len(features(vmm)) == 20
        with connected(paths[0]) as one, connected(paths[1]) as two:
            assert features(one) == features(two)
            assert stopped(process, number) == 0
    assert not any(path.exists() for path in paths)


def test_nothing_stays_behind_a_killed_server(top: Path) -> None:
    with server(f"--shared-dir={top / 'share'}", f"--socket-path={top / 's'}") as process:
        child = inside(process.pid)
        assert child != process.pid
        process.kill()
        wait_until(lambda: not Path(f"/proc/{child}/fd").exists(), 10, "the sandbox is empty")


def test_a_socket_that_libvirt_has_opened(top: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(top / "s"))
        listener.listen(1)
        fd = listener.fileno()
        with server(f"--fd={fd}", "-o", f"source={top / 'share'}", pass_fds=[fd]) as process:
            for _ in range(2):
                with connected(top / "s") as vmm:
                    assert len(features(vmm)) == 20
            assert stopped(process) == 0
    assert (top / "s").exists()  # it is libvirt's


def test_a_connection_that_is_handed_over(top: Path) -> None:
    """The server ends with it."""
    ours, theirs = socket.socketpair()
    with theirs, ours:
        fd = theirs.fileno()
        with server(f"--fd={fd}", f"--shared-dir={top / 'share'}", pass_fds=[fd]) as process:
            theirs.close()
            assert len(features(ours)) == 20
            ours.close()
            assert process.wait(STOP_TIMEOUT) == 0


def test_socket_activation(top: Path) -> None:
    """Two sockets of systemd's, which is notified of the readiness."""
    activate = (
        "import os, socket, sys\n"
        "for number, path in enumerate(sys.argv[1:3]):\n"
        "    s = socket.socket(socket.AF_UNIX); s.bind(path); s.listen()\n"
        "    os.dup2(s.fileno(), 50 + number)\n"
        "for number in range(2): os.dup2(50 + number, 3 + number)\n"
        "os.environ.update(LISTEN_FDS='2', LISTEN_PID=str(os.getpid()))\n"
        "os.execv(sys.argv[3], sys.argv[3:])\n"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(os.fspath(top / "notify"))
        manager.settimeout(20)
        process = subprocess.Popen(
            [sys.executable, "-c", activate, top / "a", top / "b", DAEMON,
             f"--shared-dir={top / 'share'}"],
            env={**os.environ, "NOTIFY_SOCKET": os.fspath(top / "notify")},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert manager.recv(100) == b"READY=1"
            for name in ("a", "b"):
                with connected(top / name) as vmm:
                    assert len(features(vmm)) == 20
            assert stopped(process) == 0
        finally:
            process.kill()
            process.wait(STOP_TIMEOUT)


# Settings


def test_rlimit_nofile(top: Path) -> None:
    arguments = [f"--shared-dir={top / 'share'}", f"--socket-path={top / 's'}"]
    with server(*arguments, "--rlimit-nofile=4321") as process:
        limits = Path(f"/proc/{inside(process.pid)}/limits").read_text()
        assert "4321" in next(line for line in limits.splitlines() if "open files" in line)


def test_a_limit_that_cannot_be_had(top: Path) -> None:
    """Not even by root: fs.nr_open."""
    arguments = [f"--shared-dir={top / 'share'}", f"--socket-path={top / 's'}"]
    refused(run([DAEMON, *arguments, "--rlimit-nofile=2147483648"]), "--rlimit-nofile=2147483648: ")


def test_tag(top: Path) -> None:
    """A VMM that asks the device gets it; without --tag there is nothing to ask."""
    arguments = [f"--shared-dir={top / 'share'}", f"--socket-path={top / 's'}"]
    with server(*arguments, "--tag=share of mine") as process:
        vmm = Frontend(top / "s")
        assert vmm.negotiate() & Protocol.CONFIG
        answer = vmm.ask(Type.GET_CONFIG, Config(0, 36, 0, bytes(36)), Config)
        assert isinstance(answer, Config)
        assert answer.data.rstrip(b"\0") == b"share of mine"
        vmm.close()
        assert stopped(process) == 0
    with server(*arguments) as process:
        vmm = Frontend(top / "s")
        assert not vmm.negotiate() & Protocol.CONFIG
        vmm.close()
        assert stopped(process) == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_pool_size(top: Path, threads: int) -> None:
    """So many wait for a file system that does not answer; the others wait for them."""
    (top / "real").mkdir()
    slow = subprocess.Popen(
        ["bindfs", "-f", top / "real", top / "share"], stderr=subprocess.DEVNULL
    )
    files = 4
    try:
        wait_until(lambda: os.path.ismount(top / "share"), 10, "bindfs is mounted")
        arguments = [f"--shared-dir={top / 'share'}", f"--socket-path={top / 's'}"]
        with server(*arguments, f"--thread-pool-size={threads}") as process:
            with closing(Driver(top / "s")) as driver:
                handles = [driver.create(b"f%d" % number) for number in range(files)]
                os.kill(slow.pid, signal.SIGSTOP)
                for handle in handles:
                    driver.send(Opcode.FSYNC, handle.nodeid, fuse.FSYNC_IN.pack(handle.fh, 0))
                tasks = Path(f"/proc/{inside(process.pid)}/task")

                def waiting() -> int:
                    return sum("request_wait" in (t / "wchan").read_text() for t in tasks.iterdir())

                wait_until(lambda: waiting() == threads, 10, f"{threads} threads that wait")
                time.sleep(0.2)
                assert waiting() == threads
                os.kill(slow.pid, signal.SIGCONT)
                assert [driver.receive() for _ in handles] == [0] * files
            assert stopped(process) == 0
    finally:
        os.kill(slow.pid, signal.SIGCONT)
        subprocess.run(["umount", top / "share"], check=True)
        slow.wait(STOP_TIMEOUT)


@pytest.mark.parametrize(
    ("options", "offered"),
    [
        (["--cache=auto"], True),
        (["--cache=auto", "--no-readdirplus"], False),
        (["--cache=auto", "-o", "no_readdirplus"], False),
        (["--cache=never"], False),
        ([], False),
    ],
)
def test_readdirplus(top: Path, options: list[str], offered: bool) -> None:
    """Only where guests may keep the attributes."""
    arguments = [f"--shared-dir={top / 'share'}", f"--socket-path={top / 's'}", *options]
    with server(*arguments) as process:
        driver = Driver(top / "s", flags=Init.DO_READDIRPLUS | Init.READDIRPLUS_AUTO)
        assert bool(driver.agreed & Init.DO_READDIRPLUS) is offered
        assert bool(driver.agreed & Init.READDIRPLUS_AUTO) is offered
        driver.close()
        assert stopped(process) == 0


@contextmanager
def before_all_others(*pids: int) -> Iterator[None]:
    """While other programs want the processors, nothing is polled. These get them first."""

    def prefer(pid: int, policy: int, priority: int) -> None:
        for thread in os.listdir(f"/proc/{pid}/task") if os.geteuid() == 0 else ():
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))

    for pid in (*pids, os.getpid()):
        prefer(pid, os.SCHED_FIFO, 1)
    try:
        yield
    finally:
        prefer(os.getpid(), os.SCHED_OTHER, 0)


@pytest.mark.parametrize("window", [0, 10_000])
def test_busy_poll(top: Path, window: int) -> None:
    """A request is seen without a kick, if it comes soon after others."""
    arguments = [f"--shared-dir={top / 'share'}", f"--socket-path={top / 's'}"]
    with server(*arguments, f"--busy-poll={window}") as process:
        driver = Driver(top / "s")
        seen, expected = 0, window > 0 and PROCESSORS > 1
        deadline = time.monotonic() + 60
        with before_all_others(process.pid, inside(process.pid)):
            for number in itertools.count():
                if number >= 20 and (bool(seen) == expected or time.monotonic() > deadline):
                    break
                for kick in (True, True, True, False):
                    driver.send(Opcode.STATFS, 1, b"", kick=kick)
                    if not kick:
                        time.sleep(0.02)
                        seen += driver.queue.used_count
                        driver.queue.kick()
                    assert driver.receive() == 0
        assert bool(seen) is expected
        driver.close()
        assert stopped(process) == 0


def test_what_is_as_it_is_always(top: Path) -> None:
    """Options of virtiofsd's that change nothing here, in the words of both of its versions."""
    given = ["-f", "-d", "--allow-mmap", "--killpriv-v2", "--preserve-noatime", "-o", "readdirplus",
             "-o", f"source={top / 'share'},vhost_user_socket={top / 's'},cache=none,sandbox=none",
             "-o", "no_writeback,no_xattr,killpriv_v2,no_allow_direct_io"]  # fmt: skip
    with server(*given) as process:
        with connected(top / "s") as vmm:
            assert len(features(vmm)) == 20
        assert stopped(process) == 0
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


def test_modcaps(top: Path) -> None:
    arguments = [f"--shared-dir={top / 'share'}", f"--socket-path={top / 's'}"]
    with server(*arguments, "--modcaps=-mknod:+sys_admin") as process:
        text = Path(f"/proc/{inside(process.pid)}/status").read_text()
        kept = int(text.partition("CapPrm:")[2].split()[0], 16)
        assert (kept >> 27 & 1, kept >> 21 & 1) == (0, 1)


def test_log_level(top: Path) -> None:
    arguments = [f"--shared-dir={top / 'share'}", f"--socket-path={top / 's'}"]
    for level, said in (("info", True), ("error", False), ("off", False)):
        with server(*arguments, f"--log-level={level}") as process:
            with connected(top / "s") as vmm:
                features(vmm)
            assert stopped(process) == 0
            assert process.stderr is not None
            assert (b"VMM connected" in process.stderr.read()) is said, level


def test_syslog(top: Path, tmp_path: Path) -> None:
    """In a mount namespace that has a /dev/log."""
    arguments: list[str | Path] = [
        DAEMON, f"--shared-dir={top / 'share'}", f"--socket-path={top / 's'}", "--syslog"
    ]  # fmt: skip
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(os.fspath(top / "log"))
        log.settimeout(20)
        setup = "mount -t tmpfs none /dev; for f in null urandom; do :; done"
        setup = (
            f"mount -t tmpfs none /dev\nmknod -m 666 /dev/null c 1 3\nln -s {top / 'log'} /dev/log"
        )
        process = subprocess.Popen(
            private(setup, *arguments), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            assert process.stdout is not None
            assert await_ready(process, process.stdout).startswith("fsd: ready")
            with connected(top / "s") as vmm:
                features(vmm)
            words = b""
            while b"VMM connected" not in words:
                words = log.recv(10_000)
            assert b"fsd-virtiofsd[" in words
            assert stopped(process) == 0
        finally:
            process.kill()
            process.wait(STOP_TIMEOUT)
            assert process.stdout is not None
            process.stdout.close()

"""`fsd virtiofs`, also installed as `fsd-virtiofsd`: the command line of virtiofsd (Rust) 1.13.

Programs that start virtiofsd can start this server instead. Unsupported options are refused
(docs/virtiofs.md has the table); `-o` takes the options of the older virtiofsd in C.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import click

from ..process import sandbox, systemd
from ..process.keeper import KEEPER, Keeper
from ..process.logs import log_to_stderr, log_to_syslog
from ..process.seccomp import ACTIONS
from ..servers.start import StartError
from ..servers.virtiofs import (
    BUSY_POLL,
    CACHES,
    TAG_BYTES,
    Offer,
    Options,
    listener_name,
    run,
)
from .errors import run_command

CAPABILITIES = {"type": "fs", "features": ["separate-options"]}
"""--print-capabilities: docs/interop/vhost-user.json of QEMU, and what libvirt asks for. There is
no migrate-precopy."""
LEVELS = {
    "error": "error", "warn": "warning", "info": "info", "debug": "debug", "trace": "debug",
    "off": "critical",
}  # fmt: skip
_SOCKETS = "--socket-path, --fd or a socket from systemd"
_REFUSED = {
    "--writeback": "the guest would not see file sizes and times that the host changes",
    "--no-killpriv-v2": "the server always clears suid bits",
    "--security-label": "new files get no security labels",
    "--xattrmap": "attribute names are not mapped",
    "--uid-map": "users are not mapped",
    "--gid-map": "groups are not mapped",
    "--translate-uid": "users are not mapped",
    "--translate-gid": "groups are not mapped",
    "--migration-mode": "migration is not supported",
    "--migration-on-error": "migration is not supported",
    "--migration-verify-handles": "migration is not supported",
    "--migration-confirm-paths": "migration is not supported",
}
"""Options of virtiofsd that are not supported, and why."""
_FLAGS = {
    "--writeback", "--no-killpriv-v2", "--security-label",
    "--migration-verify-handles", "--migration-confirm-paths",
}  # fmt: skip
_COMPAT_FLAGS: dict[str, tuple[str, Any]] = {
    "xattr": ("xattr", True),
    "no_xattr": ("xattr", False),
    "posix_acl": ("posix_acl", True),
    "no_posix_acl": ("posix_acl", False),
    "allow_direct_io": ("allow_direct_io", True),
    "no_allow_direct_io": ("allow_direct_io", False),
    "announce_submounts": ("announce_submounts", True),
    "flock": ("flock", True),
    "no_flock": ("flock", False),
    "posix_lock": ("posix_lock", True),
    "no_posix_lock": ("posix_lock", False),
    "no_readdirplus": ("no_readdirplus", True),
    "debug": ("log_level", "debug"),
    # As it is:
    "readdirplus": ("", None),
    "killpriv_v2": ("", None),
    "no_writeback": ("", None),
    "no_security_label": ("", None),
}
_COMPAT_VALUES: dict[str, tuple[str, dict[str, str] | None]] = {
    "source": ("shared_dir", None),
    "vhost_user_socket": ("socket_path", None),
    "modcaps": ("modcaps", None),
    "cache": ("cache", {"auto": "auto", "always": "always", "none": "never",
                        "never": "never", "metadata": "metadata"}),
    "sandbox": ("sandbox", {"namespace": "namespace", "chroot": "chroot", "none": "none"}),
    "loglevel": ("log_level", {"debug": "debug", "info": "info", "warn": "warn", "err": "error"}),
    "log_level": ("log_level", {"debug": "debug", "info": "info", "warn": "warn", "err": "error"}),
}  # fmt: skip


def main() -> None:
    """Entry point of `fsd-virtiofsd`."""
    run_command(virtiofs)


def _print_capabilities(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        print(json.dumps(CAPABILITIES, indent=2))
        ctx.exit()


def _refuse(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value not in (None, False, ()):
        option = parameter.opts[0]
        raise click.UsageError(f"{option} is not supported: {_REFUSED[option]}", ctx)


def _refused(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the unsupported options, which are refused."""
    for option in _REFUSED:
        if option in _FLAGS:
            attributes: dict[str, Any] = {"is_flag": True}
        else:
            attributes = {"multiple": True}
        command = click.option(
            option, hidden=True, callback=_refuse, expose_value=False, **attributes
        )(command)
    return command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--shared-dir", help="The directory to share.")
@click.option(
    "--socket-path",
    "--socket",
    multiple=True,
    help="Listen on this Unix socket; one for each guest.",
)
@click.option("--socket-group", help="Let this group connect, too.")
@click.option("--fd", multiple=True, type=int, help="Use this open socket.")
@click.option("--tag", default="", help="The share's name, for VMMs that ask the device for it.")
@click.option(
    "--cache",
    type=click.Choice([*CACHES, "none"]),
    help="What guests may cache. [default: file data, until the next open]",
)
@click.option("--readonly", is_flag=True, help="Let guests read only.")
@click.option("--xattr", is_flag=True, help="Support extended attributes.")
@click.option("--posix-acl", is_flag=True, help="Support POSIX ACLs (and extended attributes).")
@click.option("--allow-direct-io", is_flag=True, help="Apply O_DIRECT on the host, too.")
@click.option("--no-readdirplus", is_flag=True, help="Send directory listings without attributes.")
@click.option(
    "--announce-submounts", is_flag=True, help="Show guests where the host's mounts begin."
)
@click.option("--no-announce-submounts", is_flag=True, help="Do not show them. [default]")
@click.option(
    "--inode-file-handles",
    default="prefer",
    show_default=True,
    type=click.Choice(["never", "prefer", "fallback", "mandatory"]),
    help="Open files by file handle.",
)
@click.option(
    "--sandbox",
    "sandboxing",
    default="namespace",
    show_default=True,
    type=click.Choice(["namespace", "chroot", "none"]),
)
@click.option(
    "--seccomp",
    type=click.Choice([*ACTIONS, "none"]),
    default="refuse",
    show_default=True,
    help="What to do with system calls that are not on the allow list.",
)
@click.option(
    "--modcaps", help="Change the capabilities that the server keeps, e.g. +sys_admin:-mknod."
)
@click.option(
    "--rlimit-nofile",
    type=click.IntRange(0),
    help="Limit of open descriptors; 0 leaves it as it is.",
)
@click.option(
    "--thread-pool-size",
    type=click.IntRange(0),
    default=0,
    help="Threads for slow calls, for each guest; 0: four.",
)
@click.option(
    "--busy-poll",
    type=click.FloatRange(0, 10_000),
    default=BUSY_POLL * 1e6,
    show_default=True,
    metavar="MICROSECONDS",
    help="Poll this long for the next request before sleeping; 0 saves processor time.",
)
@click.option(
    "--keep",
    is_flag=True,
    help="Restart the server if it exits; guests keep running. SIGUSR2 replaces it with the "
    "installed version.",
)
@click.option(
    "--max-watches",
    type=click.IntRange(1),
    help="Use at most this many host watches. [default: 3/4 of the host's limit]",
)
@click.option(
    "--overflow-after-loss",
    is_flag=True,
    help="Send observers (fsd-guest watch) IN_Q_OVERFLOW even if a comparison recovers the loss.",
)
@click.option("--log-level", type=click.Choice([*LEVELS]), default="info", show_default=True)
@click.option("--syslog", is_flag=True, help="Log to syslog instead of stderr.")
@click.option("--allow-mmap", is_flag=True, hidden=True)
@click.option("--killpriv-v2", is_flag=True, hidden=True)
@click.option("--preserve-noatime", is_flag=True, hidden=True)
@click.option("-o", "compat", multiple=True, hidden=True)
@click.option("-d", "debug", is_flag=True, hidden=True)
@click.option("-f", "foreground", is_flag=True, hidden=True)
@click.option(
    "--print-capabilities",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_capabilities,
    help="Print the capabilities that management layers ask for, as JSON.",
)
@click.version_option(None, "-V", "--version", package_name="fsd", prog_name="fsd-virtiofsd")
@_refused
def virtiofs(**given: Any) -> int:
    """Share a directory with virtual machines over virtiofs.

    Takes the options of virtiofsd (Rust). Once `fsd-guest agent` runs in the guest, inotify there
    reports what changes on the host.
    """  # fmt: skip
    _take_compat(given)
    is_kept = bool(os.environ.pop(KEEPER, ""))
    inherited = systemd.listen_fds()
    if is_kept:  # the sockets given as --fd
        given["fd"] = inherited.sockets
    options = _options(given, inherited)
    level = LEVELS["debug" if given["debug"] else given["log_level"]]
    if given["syslog"]:
        log_to_syslog(level, "fsd-virtiofsd")
    else:
        log_to_stderr(level)
    try:
        if given["keep"] and not is_kept:
            command = [sys.executable, *sys.orig_argv[1:]]
            paths = {systemd.KEPT + listener_name(path): path for path in options.socket_paths}
            return Keeper(command, options.fds, paths).run()
        return run(options)
    except StartError as error:
        raise click.ClickException(str(error)) from None


def _take_compat(given: dict[str, Any]) -> None:
    """`-o`: options of virtiofsd in C, which virtiofsd in Rust and libvirt still use."""
    given["flock"] = given["posix_lock"] = None
    for text in given["compat"]:
        for word in re.split(r"(?<!,),(?!,)", text):  # a comma in a value is written twice
            word = word.replace(",,", ",")
            name, equals, value = word.partition("=")
            if not equals and name in _COMPAT_FLAGS:
                option, setting = _COMPAT_FLAGS[name]
                if option:
                    given[option] = setting
            elif equals and name in _COMPAT_VALUES:
                option, values = _COMPAT_VALUES[name]
                if values is not None and value not in values:
                    raise click.UsageError(f"-o {word}: {name} is one of {', '.join(values)}")
                setting = values[value] if values is not None else value
                option = "sandboxing" if option == "sandbox" else option
                given[option] = (setting,) if option == "socket_path" else setting
            else:
                raise click.UsageError(f"-o {word} is not supported")


def _options(given: dict[str, Any], inherited: systemd.Inherited) -> Options:
    if not given["shared_dir"]:
        raise click.UsageError("--shared-dir is missing")
    paths, fds = tuple(given["socket_path"]), tuple(given["fd"])
    if "" in paths:
        raise click.UsageError("--socket-path: the path is empty")
    if paths and fds:
        raise click.UsageError("--socket-path and --fd cannot be used together")
    if fds and given["socket_group"]:
        raise click.UsageError("--socket-group and --fd cannot be used together")
    if given["announce_submounts"] and given["no_announce_submounts"]:
        raise click.UsageError(
            "--announce-submounts and --no-announce-submounts cannot be used together"
        )
    fds = fds or (() if paths else tuple(inherited.sockets))
    if not paths and not fds:
        raise click.UsageError(f"{_SOCKETS} is missing")
    for twice in (paths, fds):
        if len(set(twice)) < len(twice):
            raise click.UsageError("the same socket is given twice; each guest needs its own")
    if len(given["tag"].encode()) > TAG_BYTES:
        raise click.UsageError(f"--tag: too long, at most {TAG_BYTES} bytes")
    if given["flock"] is not given["posix_lock"]:
        raise click.UsageError(
            "-o flock and posix_lock: give both or neither, and both with or without no_"
        )
    handles = given["inode_file_handles"]
    cache = given["cache"]
    return Options(
        source=os.path.abspath(given["shared_dir"]),
        socket_paths=tuple(map(os.path.abspath, paths)),
        fds=fds,
        socket_group=given["socket_group"],
        tag=given["tag"],
        offer=Offer(
            cache="never" if cache == "none" else cache,
            posix_acl=given["posix_acl"],
            xattr=given["xattr"] or given["posix_acl"],
            locks=given["flock"] is not False,
            submounts=given["announce_submounts"],
            readdirplus=not given["no_readdirplus"],
            direct_io=given["allow_direct_io"],
        ),
        read_only=given["readonly"],
        file_handles="prefer" if handles == "fallback" else handles,
        sandbox=given["sandboxing"],
        seccomp=given["seccomp"],
        capabilities=_capabilities(given["modcaps"]),
        file_limit=given["rlimit_nofile"],
        threads=given["thread_pool_size"],
        busy_poll=given["busy_poll"] / 1e6,
        watch_limit=given["max_watches"],
        overflow_after_loss=given["overflow_after_loss"],
        kept=inherited.kept,
    )


def _capabilities(changes: str | None) -> frozenset[str]:
    """The capabilities to keep, with the user's changes."""
    kept = set(sandbox.NEEDED)
    for change in changes.split(":") if changes else ():
        sign, name = change[:1], change[1:].upper()
        if sign not in ("+", "-") or name not in sandbox.CAPABILITIES:
            raise click.UsageError(f"--modcaps: {change!r} is not +capability or -capability")
        if sign == "+":
            kept.add(name)
        else:
            kept.discard(name)
    return frozenset(kept)

"""The preloaded library: each kind of call changes the source, and leaves the mount alone.

The mount is a plain directory here, a copy of the source, so that whatever still changes it shows.
The same program, run in a third copy without the library, says what the source must look like.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.suites.place import compile_shim, preloaded

CALLS = {
    "open": "open('f', 'w').write('x'); open(top + '/n', 'x'); open('d/f', 'a').write('y')",
    "open_at": "os.close(os.open('n', os.O_CREAT, dir_fd=os.open('d', os.O_RDONLY)))",
    "open_truncate": "os.close(os.open('f', os.O_RDONLY | os.O_TRUNC))",
    "mkdir": "os.mkdir('n'); os.mkdir(top + '/d/n'); os.makedirs('d/a/b')",
    "mkdir_at": "os.mkdir('n', dir_fd=os.open('d', os.O_RDONLY))",
    "rmdir": "os.rmdir('e')",
    "unlink": "os.unlink('f'); os.remove('d/f')",
    "unlink_at": "os.unlink('f', dir_fd=os.open(top + '/d', os.O_RDONLY))",
    "rename": "os.rename('f', 'd/g'); os.rename('e', 'h')",
    "rename_at": "at = os.open('d', os.O_RDONLY); os.rename('f', 'g', src_dir_fd=at)",
    "replace": "os.replace('f', 'd/f')",
    "link": "os.link('f', 'd/g')",
    "symlink": "os.symlink('f', 'd/g'); os.symlink('x', 'n', dir_fd=os.open('d', os.O_RDONLY))",
    "mkfifo": "os.mkfifo('n'); os.mkfifo('n', dir_fd=os.open('d', os.O_RDONLY))",
    "mknod": "os.mknod('n')",
    "truncate": "os.truncate('f', 1)",
    "chmod": "os.chmod('f', 0o600); os.chmod('f', 0o711, dir_fd=os.open('d', os.O_RDONLY))",
    "fchmod": "os.fchmod(os.open('f', os.O_RDONLY), 0o600)",
    "utime": "os.utime('f', (1, 1)); os.utime('l', (2, 2), follow_symlinks=False)",
    "futimens": "os.utime(os.open('f', os.O_RDONLY), (3, 3))",
    "xattr": "os.setxattr('f', 'user.a', b'1'); os.setxattr(os.open('d', 0), 'user.b', b'2')",
    "removexattr": "os.removexattr('x', 'user.a')",
    "through_a_link": "open('l', 'a').write('z'); os.chmod('l', 0o600); open('ld/n', 'w')",
    "through_a_link_by_path": "os.symlink(top + '/d', 'n'); os.symlink(top + '/d/f', 'm');"
    "open('n/new', 'w'); os.unlink('n/f')",
    "parent": "os.chdir('d'); open('../f', 'w'); os.mkdir('../d/n')",
    "outside_by_a_link": "os.symlink(top, '../way'); open('../way/n', 'w'); os.unlink('../way')",
    "temporary": "import tempfile; tempfile.mkdtemp('', 'a', '.') and os.mkdir('n')",
}
COMMANDS = {
    "touch": "touch f n; touch -d @7 d/f",
    "redirect": "echo x > f; echo y >> d/f; : > x",
    "tools": "cp f n; mv d/f m; ln f o; ln -s f p; mkdir q; rmdir e",
    "chmod": "chmod -R go-r d; chmod +x f",
    "rm": "rm -rf d",
    "install": "install -m 600 f n",
    "sed": "sed -i s/t/T/ f",
    "truncate": "truncate -s 100 f",
    "mktemp": "mktemp -p . aXXX >/dev/null; mktemp -d -p d bXXX >/dev/null",
    "node": 'node -e \'fs.writeFileSync("n", "x"); fs.mkdirSync("m/o", {recursive: true});'
    'fs.renameSync("f", "m/f"); fs.rmSync("d", {recursive: true}); fs.copyFileSync("x", "y")\'',
    "perl": 'perl -e \'open(F, ">n"); mkdir "m"; unlink "f"; rename "x", "y"\'',
}


def fill(top: Path) -> Path:
    """The same small tree at each place."""
    (top / "d").mkdir(parents=True)
    (top / "e").mkdir()
    for name in ("f", "d/f", "x"):
        (top / name).write_text("text")
        os.utime(top / name, (1e9, 1e9))
    os.setxattr(top / "x", "user.a", b"1")
    (top / "l").symlink_to("d/f")
    (top / "ld").symlink_to("d")
    return top


def tree(top: Path) -> dict[str, object]:
    """What is there; times only where they were set, names that are made up shortened."""
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        seen = path.lstat()
        entry: list[object] = [oct(seen.st_mode), seen.st_nlink]
        if seen.st_mtime < 1e9 + 1:
            entry.append(seen.st_mtime)
        if stat.S_ISREG(seen.st_mode):
            entry.append(path.read_bytes())
        if stat.S_ISLNK(seen.st_mode):
            entry.append(os.readlink(path).rpartition("/")[2])
        else:
            entry.append([(name, os.getxattr(path, name)) for name in os.listxattr(path)])
        name = str(path.relative_to(top))
        made_up = name.rpartition("/")[2][0] in "ab" and len(path.name) in (4, 9)
        found[name[: -len(path.name) + 1] + "…" if made_up else name] = entry
    return found


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shim(tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize(
    ("command", "text"),
    [
        *(pytest.param("python", text, id=name) for name, text in CALLS.items()),
        *(pytest.param("bash", text, id=f"bash-{name}") for name, text in COMMANDS.items()),
    ],
)
def test_what_changes_is_the_source(tmp_path: Path, shim: Path, command: str, text: str) -> None:
    tops = {name: fill(tmp_path / name / "top") for name in ("plain", "source", "mount")}
    before = tree(tops["mount"])
    for name in ("plain", "mount"):
        top = tops[name]
        given = [sys.executable, "-B", "-c", f"import os; top = {str(top)!r}\n{text}"]
        if command == "bash":
            assert shutil.which(text.split(" ")[0]) or text.split(" ")[0] in "echo mktemp touch"
            given = ["bash", "-euc", text]
        extra = preloaded(shim, tops["source"], tops["mount"]) if name == "mount" else {}
        env = os.environ | extra | {"HOME": str(tmp_path)}
        subprocess.run(given, cwd=top, env=env, check=True, timeout=60)
    assert tree(tops["mount"]) == before
    assert tree(tops["source"]) == tree(tops["plain"])
    assert tree(tops["plain"]) != before  # so the call is one that changes something


def test_what_reads_stays_on_the_mount(tmp_path: Path, shim: Path) -> None:
    source, mount = fill(tmp_path / "source"), fill(tmp_path / "mount")
    (source / "f").write_text("the source's")
    (mount / "f").write_text("the mount's")
    (mount / "only").touch()
    code = (
        "import os; fd = os.open('.', os.O_RDONLY); at = os.open('f', os.O_PATH)\n"
        "print(open('f').read(), os.path.exists('only'), os.path.exists('d/../only'),\n"
        " 'only' in os.listdir(fd), os.getcwd(), os.readlink(f'/proc/self/fd/{at}'))"
    )
    env = os.environ | preloaded(shim, source, mount)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=mount, env=env, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == f"the mount's True True True {mount} {mount}/f\n"

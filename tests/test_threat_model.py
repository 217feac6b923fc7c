"""docs/threat-model.md and SECURITY.md: what they cite is there, a running server as they say."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from harness.share_server import shared

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/threat-model.md").read_text()


@pytest.mark.parametrize("file", sorted(set(re.findall(r"tests/[\w/]+\.py", PAGE))))
def test_a_cited_test_is_there(file: str) -> None:
    text = (ROOT / file).read_text()
    for name in re.findall(re.escape(file) + r" -k (\w+)", PAGE):
        assert re.search(rf"def test_\w*{name}", text), name


def test_the_sandboxs_tests_are_there() -> None:
    _, _, part = PAGE.partition("## What the sandbox leaves")
    part, _, _ = part.partition("An attacker who took")
    text = (ROOT / "tests/test_sandbox.py").read_text()
    rows = [line for line in part.splitlines() if line.startswith("| ")][1:]
    names = [name for row in rows for name in re.findall(r"`([a-z_]+)`", row.split("|")[3])]
    assert len(names) > 8
    for name in names:
        assert f"def test_{name}(" in text, name


def test_links_lead_somewhere() -> None:
    for page in ("docs/threat-model.md", "SECURITY.md"):
        for link in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: an ordinary user has none to give up")
def test_a_running_server(tmp_path: Path) -> None:
    (bits, most) = re.findall(r"`([0-9a-f]{8})`", PAGE)[:2]
    with shared(tmp_path) as share:
        lines = Path(f"/proc/{share.pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        mounts = Path(f"/proc/{share.pid}/mountinfo").read_text().splitlines()
    assert int(status["CapEff"], 16) == int(bits, 16)
    assert int(status["CapPrm"], 16) == int(status["CapBnd"], 16) == int(most, 16)
    assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    (root,) = mounts
    assert {"nosuid", "nodev", "noexec"} <= set(root.split()[5].split(","))

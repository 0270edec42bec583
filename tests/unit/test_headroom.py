from __future__ import annotations

from pathlib import Path

import pytest

from pyksm import headroom as room
from pyksm.headroom import headroom

GIB = 1 << 30


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2097152 kB\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "cgroups").mkdir()
    return tmp_path


def ask(tree: Path) -> room.Headroom:
    return headroom(tree / "proc", tree / "meminfo", tree / "cgroups")


def cgroup(tree: Path, line: str, path: str, **files: object) -> None:
    (tree / "proc" / "cgroup").write_text(line + "\n")
    folder = tree / "cgroups" / path
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_without_a_cgroup_it_is_mem_available(tree: Path) -> None:
    assert ask(tree) == room.Headroom(2 * GIB, "MemAvailable")


def test_the_tightest_cgroup_above_counts(tree: Path) -> None:
    cgroup(tree, "0::/a/b", "a", memory__max=GIB, memory__current=GIB // 2, memory__stat="x 1")
    (tree / "cgroups" / "a" / "b").mkdir()
    (tree / "cgroups" / "a" / "b" / "memory.max").write_text("max\n")
    found = ask(tree)
    assert found.nbytes == GIB // 2
    assert found.bound.endswith("cgroups/a")


def test_file_pages_that_can_go_count_as_room(tree: Path) -> None:
    cgroup(
        tree, "0::/a", "a", memory__max=GIB, memory__current=GIB, memory__stat="inactive_file 4096"
    )
    assert ask(tree).nbytes == 4096


def test_version_1(tree: Path) -> None:
    cgroup(
        tree,
        "5:memory:/a",
        "memory/a",
        memory__limit_in_bytes=GIB,
        memory__usage_in_bytes=GIB - 8192,
        memory__stat="inactive_file 1\ntotal_inactive_file 0",
    )
    assert ask(tree).nbytes == 8193


def test_no_limit_of_version_1_is_a_huge_number(tree: Path) -> None:
    cgroup(tree, "5:cpu,memory:/", "memory", memory__limit_in_bytes=9223372036854771712)
    assert ask(tree).bound == "MemAvailable"


def test_require_names_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "headroom", lambda: room.Headroom(1000, "MemAvailable"))
    with pytest.raises(MemoryError, match=r"2048 bytes.*1000 bytes"):
        room.require(2048, "unmerging this")
    room.require(2048, "unmerging this", force=True)
    room.require(999, "unmerging this")

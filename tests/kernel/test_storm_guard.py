"""An unmerge that would not fit refuses, inside a real memory cgroup."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Ksmd, spawn, wait_until

MIB = 1 << 20


class Cgroup:
    """A memory cgroup of either version."""

    def __init__(self) -> None:
        v1 = Path("/sys/fs/cgroup/memory")
        root = v1 if v1.is_dir() else Path("/sys/fs/cgroup")
        self.limit_file = "memory.limit_in_bytes" if v1.is_dir() else "memory.max"
        self.usage_file = "memory.usage_in_bytes" if v1.is_dir() else "memory.current"
        self.path = root / f"pyksm-test-{os.getpid()}"

    def create(self) -> None:
        if not (self.path.parent / "cgroup.procs").exists():
            raise AssertionError(f"no memory cgroup can be made under {self.path.parent}")
        if self.limit_file == "memory.max":
            with contextlib.suppress(OSError):
                (self.path.parent / "cgroup.subtree_control").write_text("+memory")
        self.path.mkdir()

    def add(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    @property
    def usage(self) -> int:
        return int((self.path / self.usage_file).read_text())

    def limit(self, nbytes: int) -> None:
        (self.path / self.limit_file).write_text(str(nbytes))


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    cgroup = Cgroup()
    cgroup.create()
    yield cgroup
    deadline = time.monotonic() + 10
    while True:
        try:
            cgroup.path.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def worker() -> None:
    import mmap
    import os

    import pyksm

    for _ in commands():  # noqa: F821
        break  # wait until the parent has put us into the cgroup
    memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory[:] = os.urandom(32 << 20) * 2
    region = pyksm.Region(memory)
    undo = region.merge()
    say("ready")  # noqa: F821
    verbs = {
        "region": region.unmerge,
        "undo": undo.undo,
        "process": lambda: pyksm.Process().unmerge(),
    }
    for word in commands():  # noqa: F821
        if word[0] == "on":
            switch = pyksm.Process().merge()
            say("on")  # noqa: F821
            continue
        try:
            verbs[word[0]]()
        except MemoryError as error:
            merged = region.stats().merged_bytes
            say("refused", merged, "cgroup" in str(error))  # noqa: F821
        else:
            say("done", region.stats().merged_bytes)  # noqa: F821
    del switch


def test_an_unmerge_that_would_not_fit_refuses(ksmd: Ksmd, cgroup: Cgroup) -> None:
    with spawn(worker) as child:
        cgroup.add(child.pid)
        child.send("go")
        child.expect("ready")
        full = 64 * MIB
        wait_until(lambda: int(_ksm_kb(child.pid)) * 1024 >= full, 60, what="merging")
        ksmd.stop()
        cgroup.limit(cgroup.usage + 8 * MIB)
        for verb in ("region", "undo"):
            assert child.ask(verb) == f"refused {full} True", verb
        assert child.ask("on") == "on"
        assert child.ask("process") == f"refused {full} True"
        cgroup.limit(1 << 30)
        child.send("region")
        child.expect("done 0")


def _ksm_kb(pid: int) -> str:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("KSM:"):
            return line.split()[1]
    return "0"

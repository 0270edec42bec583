"""The parts of ``pyksm demo`` that need no kernel: digests, checks, workers, what is missing."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from fakeksm import make_sysfs
from support import wait_until

from pyksm.cli import Exit, demo, main
from pyksm.cli._demo_worker import Worker, _views, digest, file_digest
from pyksm.errors import KsmError
from pyksm.host import Host

ARRAYS = {
    "wide": np.arange(12, dtype=">f4").reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(20000, dtype="f8").reshape(100, 200)),
    "scalar": np.array(7, dtype="i2"),
    "empty": np.empty((0, 3)),
}


def write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, array in arrays.items():
        start, data = len(data), data + array.tobytes("A")
        header[name] = {
            "dtype": "U8",
            "shape": [array.nbytes],
            "data_offsets": [start, len(data)],
        }
    text = json.dumps({"__metadata__": {"format": "np"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_the_digest_of_a_file_is_that_of_its_arrays(tmp_path: Path) -> None:
    expected = digest(_views(ARRAYS))
    np.savez(tmp_path / "a.npz", **ARRAYS)
    assert file_digest(tmp_path / "a.npz") == expected
    write_safetensors(tmp_path / "a.safetensors", ARRAYS)
    assert file_digest(tmp_path / "a.safetensors") == expected
    np.save(tmp_path / "a.npy", ARRAYS["fortran"])
    assert file_digest(tmp_path / "a.npy") == digest(_views(ARRAYS["fortran"]))


@pytest.mark.parametrize("name", ["wide", "fortran", "scalar"])
def test_the_digest_sees_every_byte(name: str) -> None:
    before = digest(_views(ARRAYS))
    changed = {key: array.copy("K") for key, array in ARRAYS.items()}
    changed[name].reshape(-1, order="A").view("u1")[-1] ^= 1
    assert digest(_views(changed)) != before
    assert digest(_views({**ARRAYS, "more": np.empty(0)})) != before


def test_flip_changes_one_byte_and_changes_it_back() -> None:
    worker = Worker()
    worker.arrays = {key: array.copy("K") for key, array in ARRAYS.items()}
    before = worker.digest()
    worker.flip()
    assert worker.digest() != before
    worker.flip()
    assert worker.digest() == before


def test_checks_fail_when_they_should() -> None:
    assert demo._check_weights([True, True], [True, True]).ok
    assert not demo._check_weights([True, True], [True, False]).ok
    assert not demo._check_weights([False, True], [True, True]).ok
    assert demo._check_write([True, False, False]).ok
    assert not demo._check_write([True, False, True]).ok
    assert not demo._check_write([False, False, False]).ok, "the write was lost"
    assert demo._check_copies("AnonPages", 2.9, 4).ok
    assert not demo._check_copies("AnonPages", 2.89, 4).ok
    assert not demo._check_copies("AnonPages", 0.96, 2).ok
    assert demo._check_knobs({"run": 0}, {"run": 0}).ok
    check = demo._check_knobs({"run": 0}, {"run": 1})
    assert not check.ok
    assert check.found == "run 1, was 0"


def test_knobs_the_advisor_owns_are_not_compared(tmp_path: Path) -> None:
    root = make_sysfs(tmp_path / "ksm", advisor_mode="none [scan-time]")
    knobs = demo._knobs(Host(root))
    assert "pages_to_scan" not in knobs
    assert "run" in knobs
    assert "full_scans" not in knobs


def test_without_the_model_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_sysfs(tmp_path / "ksm")
    monkeypatch.setattr(demo, "Host", functools.partial(Host, root, lease=tmp_path / "lease"))
    monkeypatch.setattr(demo, "PACKAGE", "no-such-package-here")
    assert main(["demo"]) == Exit.USAGE
    assert "pip install --no-deps no-such-package-here" in capsys.readouterr().err


def test_too_little_memory_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_sysfs(tmp_path / "ksm")
    monkeypatch.setattr(demo, "Host", functools.partial(Host, root, lease=tmp_path / "lease"))
    with open(tmp_path / "huge.npy", "wb") as file:
        file.truncate(1 << 40)
    assert main(["demo", "--model", str(tmp_path / "huge.npy")]) == Exit.FAILURE
    assert "4.0 TiB" in capsys.readouterr().err


def test_a_worker_that_fails_is_told(tmp_path: Path) -> None:
    path = tmp_path / "broken.npy"
    path.write_bytes(b"this is no model")
    with demo._team(path, 2) as team:
        with pytest.raises(KsmError, match=r"worker \d+: .*broken\.npy"):
            team.ask("load", path=os.fspath(path))
        pids = team.pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_worker_that_dies_is_told(tmp_path: Path) -> None:
    with demo._team(tmp_path, 2) as team:
        team.processes[0].kill()
        with pytest.raises(KsmError, match=r"worker \d+ ended \(status -9\)"):
            team.ask("flip")


def test_workers_are_fresh_interpreters(tmp_path: Path) -> None:
    with demo._team(tmp_path, 2) as team:
        assert len(set(team.pids)) == 2
        for pid in team.pids:
            # exec is over for us a moment before the kernel shows the new command line
            wait_until(
                lambda pid=pid: b"_demo_worker" in Path(f"/proc/{pid}/cmdline").read_bytes(), 10
            )
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            assert words[0].decode() == sys.executable
            assert os.getsid(pid) == pid, "Ctrl-C must reach only the command"

"""``pyksm demo``: the main job of this package, from outside, on the real kernel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import Ksmd, knobs, spawn, wait_until

from pyksm.cli import Exit

SRC = Path(__file__).parents[2] / "src"
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(SRC), *filter(None, sys.path)])}

pytestmark = [pytest.mark.root, pytest.mark.kernel("smaps")]


def pyksm(*argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyksm", *map(str, argv)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Make a file of 24 MiB, in arrays small and large, without a page twice."""
    random = np.random.default_rng(5)
    sizes = [8 << 20, 12 << 20, 4 << 20, 5000, 100]
    arrays = {f"layer{n}": random.integers(0, 256, size, "u1") for n, size in enumerate(sizes)}
    np.savez(tmp_path / "model.npz", **arrays)
    return tmp_path / "model.npz"


def test_four_workers_hold_one_model() -> None:
    before = knobs()
    done = pyksm("demo", "--json")
    assert done.returncode == Exit.OK, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["model_bytes"] > 80 << 20, "the default is a real model"
    assert result["workers"] == len(set(result["pids"])) == 4
    assert result["ok"]
    assert all(check["ok"] for check in result["checks"])
    assert result["copies_saved"] == pytest.approx(3, rel=0.034)
    assert result["pss_saved_bytes"] == pytest.approx(3 * result["model_bytes"], rel=0.034)
    saved = result["before"]["quiet_bytes"] - result["after"]["quiet_bytes"]
    assert result["quiet_saved_bytes"] == saved
    assert result["settle"]["converged"]
    assert result["settle"]["ksmd_cpu_seconds"] > 0
    assert knobs() == before
    assert not any(Path(f"/proc/{pid}").exists() for pid in result["pids"])


def test_it_prints_what_it_verified(model: Path) -> None:
    done = pyksm("demo", "--model", model, "--workers", 2)
    assert done.returncode == Exit.OK, done.stdout + done.stderr
    assert done.stdout.count("ok     ") == 5
    assert "FAILED" not in done.stdout
    assert done.stdout.endswith("Verified.\n")
    assert "PSS of the 2 workers" in done.stdout
    assert done.stderr == ""


def test_before_is_before_although_ksmd_runs(ksmd: Ksmd, model: Path) -> None:
    done = pyksm("demo", "--model", model, "--workers", 3, "--json")
    assert done.returncode == Exit.OK, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["before"]["pss_bytes"] > 3 * result["model_bytes"]
    assert result["pss_saved_bytes"] == pytest.approx(2 * result["model_bytes"], rel=0.034)


def test_run_2_is_put_back_without_spoiling_the_measurement(ksmd: Ksmd, model: Path) -> None:
    ksmd.set(run=2)
    done = pyksm("demo", "--model", model, "--workers", 2)
    assert "FAILED AnonPages" not in done.stdout
    assert knobs()["run"] == "2"


@pytest.fixture
def busy(model: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a demo, and give it once it is scanning."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pyksm", "demo", "--model", str(model), "--workers", "8"],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(lambda: knobs()["run"] == "1", 30, what="the scan", longest=0.002)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, Exit.TERMINATED), (signal.SIGINT, Exit.INTERRUPTED)],
)
def test_signals_put_everything_back(
    busy: subprocess.Popen[bytes], number: signal.Signals, status: int
) -> None:
    workers = children(busy.pid)
    busy.send_signal(number)
    output = busy.communicate(timeout=30)[0].decode()
    assert busy.returncode == status, output
    assert "Traceback" not in output
    assert knobs()["run"] == "0"
    assert len(workers) == 8
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_killed_workers_end_and_the_next_call_puts_the_knobs_back(
    busy: subprocess.Popen[bytes],
) -> None:
    workers = children(busy.pid)
    busy.kill()
    busy.wait()
    assert pyksm("tune", "--restore").returncode == Exit.OK
    assert knobs()["run"] == "0"
    wait_until(lambda: not any(map(alive, workers)), 20, what="the workers' end")


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


# ---- without privilege ----


def as_nobody(*argv: str) -> None:
    import contextlib
    import importlib
    import io
    import os
    import sys

    from pyksm.cli import COMMANDS, main

    for name in COMMANDS:
        importlib.import_module(f"pyksm.cli.{name}")
    with contextlib.redirect_stdout(io.StringIO()):
        main(["status"])  # loads what is loaded late, which nobody may not be allowed to read
        main(["doctor"])
    sys.stderr = sys.stdout
    os.setgroups([])
    os.setuid(65534)
    status = main(argv)
    say("\nstatus", status)  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("demo",), "sudo pyksm tune run=1"),
        (("settle", "1"), "may not be read"),
        (("settle",), "ksmd is not running"),
        (("tune", "run=1"), "sudo pyksm tune run=1"),
        (("doctor",), "ksmd-off"),
        (("status", "1"), "may not be read"),
    ],
)
def test_without_privilege_it_says_who_can(argv: tuple[str, ...], words: str) -> None:
    lines = []
    with spawn(as_nobody, *argv) as child:
        while not lines or not lines[-1].startswith("status"):
            lines.append(child.reply())
    assert lines[-1] == f"status {Exit.KSM_OFF}", "\n".join(lines)
    assert words in "\n".join(lines)
    assert "Traceback" not in "\n".join(lines)

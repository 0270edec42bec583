"""``pyksm status``, ``settle`` and ``tune`` on the real kernel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import Ksmd, counter, knobs, spawn, wait_until

from pyksm._buffer import Buffer
from pyksm.cli import Exit, main
from pyksm.process import Process

MIB = 1 << 20
SRC = Path(__file__).parents[2] / "src"
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(SRC), *filter(None, sys.path)])}

pytestmark = [pytest.mark.root, pytest.mark.kernel("smaps")]


def loaded() -> None:
    import pyksm

    buffer = pyksm.Buffer(8 << 20)
    with memoryview(buffer) as view:
        for page in range(0, len(view), 4096):
            view[page : page + 8] = (page + 1).to_bytes(8, "little")
    say("ready")  # type: ignore[name-defined]  # noqa: F821
    for _ in commands():  # type: ignore[name-defined]  # noqa: F821
        for page in range(0, len(buffer), 4096):
            memoryview(buffer)[page] ^= 255
        say("written")  # type: ignore[name-defined]  # noqa: F821


def test_settle_merges_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    before = knobs()
    with spawn(loaded) as one, spawn(loaded) as two:
        one.expect("ready")
        two.expect("ready")
        assert main(["settle", str(one.pid), str(two.pid), "--json"]) == Exit.OK
        result = json.loads(capsys.readouterr().out)
        assert result["converged"]
        assert result["merged_bytes"] >= 16 * MIB
        assert result["saved_bytes"] == pytest.approx(8 * MIB, rel=0.1)
        assert knobs() == before
        assert main(["status", str(one.pid), "--json"]) == Exit.OK
        (line,) = json.loads(capsys.readouterr().out)["processes"]
        assert line["pid"] == one.pid
        assert line["user"]
        assert line["stats"] == Process(one.pid).stats().to_dict()
        assert line["stats"]["saved_bytes"] == pytest.approx(4 * MIB, rel=0.1)
        assert line["marked_bytes"] >= 8 * MIB


def test_settle_without_pids_is_for_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    with spawn(loaded) as one, spawn(loaded) as two:
        one.expect("ready")
        two.expect("ready")
        assert main(["settle"]) == Exit.OK
        text = capsys.readouterr().out
        assert text.startswith("Merging ...\nMerged: ")
        assert Process(two.pid).stats().merged_bytes == pytest.approx(8 * MIB, rel=0.1)


def test_settle_says_when_the_time_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    before = knobs()
    with spawn(loaded) as one:
        one.expect("ready")
        assert main(["settle", str(one.pid), "--timeout", "0"]) == Exit.TIME_UP
        assert "The time ran out" in capsys.readouterr().out
    assert knobs() == before


def test_status_finds_who_has_something_marked(capsys: pytest.CaptureFixture[str]) -> None:
    buffer = Buffer(MIB)
    with memoryview(buffer) as view:
        view[:] = b"x" * MIB
    assert main(["status", "--json"]) == Exit.OK
    lines = json.loads(capsys.readouterr().out)["processes"]
    assert os.getpid() in [line["pid"] for line in lines]
    assert os.getppid() not in [line["pid"] for line in lines]
    assert main(["status"]) == Exit.OK
    assert f"{os.getpid()}" in capsys.readouterr().out
    buffer.close()


def test_watching_shows_what_writes_break(ksmd: Ksmd) -> None:
    with spawn(loaded) as one, spawn(loaded) as two:
        one.expect("ready")
        two.expect("ready")
        wait_until(lambda: counter("pages_sharing") >= 2048, 30, what="merging")
        ksmd.stop()
        watching = subprocess.Popen(
            [sys.executable, "-m", "pyksm", "status", "--watch", "--json", "--interval", "0.3"],
            env=ENV,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert watching.stdout is not None
        try:
            first = json.loads(watching.stdout.readline())
            assert first["rates"] is None
            one.ask("write")
            broken = 0.0
            while not broken:
                rates = json.loads(watching.stdout.readline())["rates"]
                broken = rates["broken"] * rates["seconds"]
            assert broken == pytest.approx(2048, rel=0.05)
            watching.send_signal(signal.SIGINT)
            assert watching.wait(20) == Exit.INTERRUPTED
        finally:
            watching.kill()
            watching.communicate()


def test_tune_sets_and_shows_the_kernels_own(capsys: pytest.CaptureFixture[str]) -> None:
    before = knobs()
    try:
        assert main(["tune", "pages_to_scan=123", "--json"]) == Exit.OK
        assert json.loads(capsys.readouterr().out)["knobs"]["pages_to_scan"] == 123
        assert counter("pages_to_scan") == 123
    finally:
        assert main(["tune", f"pages_to_scan={before['pages_to_scan']}"]) == Exit.OK
    assert knobs() == before

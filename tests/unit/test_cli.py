"""The command line without a kernel: statuses, words on standard error, signals, pipes."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from fakeksm import make_sysfs, shown

from pyksm import cli
from pyksm.cli import COMMANDS, Exit, main
from pyksm.errors import KsmError, NotSupported
from pyksm.host import Host

SRC = Path(cli.__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(SRC), *filter(None, sys.path)])}


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have every command work on a folder instead of on this kernel."""
    root = make_sysfs(tmp_path / "ksm")
    fake = functools.partial(Host, root, lease=tmp_path / "lease")
    for name in ("demo", "doctor", "settle", "status", "tune"):
        monkeypatch.setattr(f"pyksm.cli.{name}.Host", fake, raising=True)
    monkeypatch.setattr("pyksm.host.Host", fake)
    return root


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Put a function in the place of ``pyksm tune``."""

    def put(function: Callable[[], object]) -> None:
        from pyksm.cli import tune

        monkeypatch.setattr(tune, "command", click.command("tune")(function))

    return put


def test_help_names_every_command_and_every_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == Exit.OK
    text = " ".join(capsys.readouterr().out.split())
    for name, line in COMMANDS.items():
        assert f"{name} {line}" in text
    statuses = {value for key, value in vars(Exit).items() if key.isupper()}
    for status in statuses - {Exit.BROKEN_PIPE}:
        assert f" {int(status)} " in text
    assert len(statuses) == 9, "every status is distinct"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_what_the_command_says(name: str) -> None:
    command = cli.pyksm.get_command(click.Context(cli.pyksm), name)
    assert command is not None
    assert command.name == name
    assert command.help
    assert command.help.splitlines()[0] == COMMANDS[name]
    assert main([name, "--help"]) == Exit.OK


def test_help_loads_neither_numpy_nor_rich_nor_a_command() -> None:
    code = "import sys; from pyksm.cli import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    heavy = {"numpy", "rich", "psutil", "asyncio", "importlib.metadata", "dataclasses"}
    assert not loaded & (heavy | {f"pyksm.cli.{name}" for name in COMMANDS})


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == Exit.OK
    assert capsys.readouterr().out.startswith("pyksm ")


@pytest.mark.parametrize(
    "argv",
    [
        ["nonsense"],
        ["status", "x"],
        ["status", "0"],
        ["settle", "--cpu", "0"],
        ["settle", "--cpu", "1.5"],
        ["settle", "--timeout", "-1"],
        ["demo", "--workers", "1"],
        ["demo", "--model", "/nonexistent"],
        ["tune", "pages_to_scan"],
        ["tune", "pages_to_scan="],
        ["tune", "no_such_knob=1"],
        ["tune", "full_scans=1"],
        ["tune", "run=3"],
        ["tune", "run=one"],
        ["tune", "run=1", "run=0"],
        ["tune", "--force"],
        ["tune", "--restore", "run=1"],
        ["tune", "advisor_max_cpu=4294967297"],
    ],
)
def test_wrong_usage(argv: list[str], sysfs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = shown(sysfs)
    assert main(argv) == Exit.USAGE
    printed = capsys.readouterr()
    assert not printed.out
    assert "Error: " in printed.err
    assert "Traceback" not in printed.err
    assert shown(sysfs) == before


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KsmError("it broke"), Exit.FAILURE, "pyksm: it broke\n"),
        (ValueError("bad value"), Exit.FAILURE, "pyksm: bad value\n"),
        (MemoryError("3 GiB"), Exit.FAILURE, "pyksm: 3 GiB\n"),
        (ProcessLookupError(3, "there is no process 7"), 1, "pyksm: there is no process 7\n"),
        (PermissionError(13, "not yours"), Exit.KSM_OFF, "pyksm: not yours\n"),
        (OSError(30, "read-only"), Exit.KSM_OFF, "pyksm: read-only\n"),
        (NotSupported("no", hint="Do it"), Exit.NO_KSM, "pyksm: no\n  Do it\n"),
        (NotSupported("no", hint="Do it", errno=13), Exit.KSM_OFF, "pyksm: no\n  Do it\n"),
        (FileNotFoundError(2, "No such file", "/x"), 1, "pyksm: No such file: /x\n"),
    ],
)
def test_errors_are_one_sentence_and_a_hint(
    error: Exception,
    status: int,
    words: str,
    sysfs: Path,
    command: Callable[[Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    command(fail)
    assert main(["tune"]) == status
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", words)
    with pytest.raises(type(error)):
        main(["--debug", "tune"])


def test_a_mistake_of_ours_is_not_hidden(command: Callable[[Callable[[], object]], None]) -> None:
    def fail() -> None:
        raise AttributeError("a bug")

    command(fail)
    with pytest.raises(AttributeError):
        main(["tune"])


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, Exit.INTERRUPTED), (signal.SIGTERM, Exit.TERMINATED)],
)
def test_signals_unwind(
    number: signal.Signals, status: int, command: Callable[[Callable[[], object]], None]
) -> None:
    put_back = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), number)  # a second one must not end the putting back
            put_back.append(True)

    command(work)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert main(["tune"]) == status
    assert put_back
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("argv", [["--help"], ["tune"]])
def test_a_closed_pipe_is_no_error(argv: list[str], tmp_path: Path) -> None:
    make_sysfs(tmp_path / "ksm")
    code = (
        "import functools, sys, pyksm.cli.tune as tune; from pyksm.cli import main; "
        f"tune.Host = functools.partial(tune.Host, {str(tmp_path / 'ksm')!r}); "
        f"sys.exit(main({argv!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == Exit.BROKEN_PIPE, errors
    assert errors == b""


# ---- tune ----


def test_tune_shows_the_knobs(sysfs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sysfs / "smart_scan").unlink()
    assert main(["tune"]) == Exit.OK
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["pages_to_scan"] == ["100"]
    assert lines["advisor_mode"] == ["none"]
    assert lines["smart_scan"] == ["-", "not", "in", "this", "kernel", "(Linux", "6.7)"]
    assert "full_scans" not in lines


def test_tune_sets_for_good(sysfs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "pages_to_scan=1000", "run=1", "--json"]) == Exit.OK
    printed = json.loads(capsys.readouterr().out)
    assert printed["knobs"]["pages_to_scan"] == 1000
    assert shown(sysfs)["pages_to_scan"] == "1000"
    assert shown(sysfs)["run"] == "1"
    assert main(["tune", "--restore"]) == Exit.OK  # what was set for good is not left-over
    assert shown(sysfs)["pages_to_scan"] == "1000"


def test_tune_shows_and_ends_requests(
    sysfs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undo = Host(sysfs, lease=tmp_path / "lease").tune(sleep_millisecs=7)
    assert main(["tune"]) == Exit.OK
    text = capsys.readouterr().out
    assert "sleep_millisecs                          7       20" in text
    assert f"Held by process {os.getpid()}: sleep_millisecs=7" in text
    assert main(["tune", "--restore", "--force"]) == Exit.OK
    assert shown(sysfs)["sleep_millisecs"] == "20"
    undo.undo()


def test_without_ksm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = functools.partial(Host, tmp_path / "absent", lease=tmp_path / "lease")
    for name in ("demo", "doctor", "settle", "status", "tune"):
        monkeypatch.setattr(f"pyksm.cli.{name}.Host", nothing)
        assert main([name]) == Exit.NO_KSM
        printed = capsys.readouterr()
        assert "CONFIG_KSM" in printed.err + printed.out
        assert "Traceback" not in printed.err


# ---- doctor ----


def test_doctor_status(sysfs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == Exit.KSM_OFF
    assert "ksmd-off" in capsys.readouterr().out
    (sysfs / "run").write_text("1\n")
    assert main(["doctor"]) == Exit.OK
    assert "Nothing keeps this host from merging" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == Exit.OK
    found = json.loads(capsys.readouterr().out)
    assert {"code", "severity", "sentence", "mend"} <= set(found[0])

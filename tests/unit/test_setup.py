"""A machine that lacks something to build with is told so in one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "check-prerequisites"

FAKE_PYTHON = """#!/bin/sh
case "$2" in
    *version_info*) exit {too_old} ;;
    *ensurepip*) exit {no_venv} ;;
    *include*) echo {include} ;;
    *CC*) echo {compiler} ;;
esac
"""


class Machine:
    """A PATH with only what the script itself uses, and fakes for what it looks for."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.include = folder / "include"
        self.bin.mkdir()
        self.include.mkdir()
        (self.include / "Python.h").touch()
        uname = shutil.which("uname")
        assert uname
        (self.bin / "uname").symlink_to(uname)
        self.python()
        self.program("gcc", "#!/bin/sh\nexit 0\n")

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def python(self, name: str = "python3", **flaws: object) -> None:
        usual = {"too_old": 0, "no_venv": 0, "include": self.include, "compiler": "gcc -pthread"}
        self.program(name, FAKE_PYTHON.format(**usual | flaws))

    def check(self, **env: str) -> tuple[int, str]:
        done = subprocess.run(
            ["/bin/sh", SCRIPT],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": str(self.bin)} | env,
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def one_sentence(text: str) -> str:
    assert text.startswith("pyksm: ")
    assert text.count("\n") == 1
    assert text.endswith(".\n")
    assert "Traceback" not in text
    return text


def test_nothing_missing_prints_the_python(machine: Machine) -> None:
    assert machine.check() == (0, "python3\n")


def test_no_venv_module(machine: Machine) -> None:
    machine.python(no_venv=1)
    status, text = machine.check()
    assert status == 1
    assert "venv module" in one_sentence(text)
    assert "`apt-get install python3-venv`" in text


def test_no_header(machine: Machine) -> None:
    (machine.include / "Python.h").unlink()
    status, text = machine.check()
    assert status == 1
    assert "Python.h" in one_sentence(text)
    assert "`apt-get install python3-dev`" in text


def test_no_compiler(machine: Machine) -> None:
    (machine.bin / "gcc").unlink()
    status, text = machine.check()
    assert status == 1
    assert "the C compiler gcc" in one_sentence(text)
    assert "`apt-get install gcc`" in text


def test_no_headers_of_the_c_library(machine: Machine) -> None:
    machine.program("gcc", "#!/bin/sh\nexit 1\n")
    status, text = machine.check()
    assert status == 1
    assert "libc6-dev" in one_sentence(text)


def test_all_of_it_missing_is_still_one_sentence(machine: Machine) -> None:
    machine.python(no_venv=1)
    (machine.include / "Python.h").unlink()
    (machine.bin / "gcc").unlink()
    status, text = machine.check()
    assert status == 1
    assert "`apt-get install python3-venv python3-dev gcc`" in one_sentence(text)


def test_no_python(machine: Machine) -> None:
    (machine.bin / "python3").unlink()
    status, text = machine.check()
    assert status == 1
    assert "Python 3.11 or newer" in one_sentence(text)


def test_an_old_python3_beside_newer_ones(machine: Machine) -> None:
    machine.python(too_old=1)
    for name in ("python3.11", "python3.13", "python3.12"):
        machine.python(name)
    assert machine.check() == (0, "python3.13\n")


def test_the_python_asked_for_is_too_old(machine: Machine) -> None:
    machine.python("python3.9", too_old=1)
    status, text = machine.check(PYTHON="python3.9")
    assert status == 1
    assert "python3.9 is not a Python of version 3.11" in one_sentence(text)


def test_the_python_asked_for_does_not_exist(machine: Machine) -> None:
    status, text = machine.check(PYTHON="/nowhere/python")
    assert status == 1
    one_sentence(text)


def test_another_system_than_linux(machine: Machine) -> None:
    (machine.bin / "uname").unlink()
    machine.program("uname", "#!/bin/sh\necho Darwin\n")
    status, text = machine.check()
    assert status == 1
    assert "Darwin" in one_sentence(text)


def test_this_machine_has_what_it_takes() -> None:
    done = subprocess.run(
        [SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert (done.returncode, done.stdout) == (0, f"{sys.executable}\n"), done.stderr


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_says_the_sentence_and_no_traceback(machine: Machine, tmp_path: Path) -> None:
    (machine.include / "Python.h").unlink()
    (tmp_path / "tools").mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "tools/check-prerequisites"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        ["make", "build"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHON": str(machine.bin / "python3"), "CC": "gcc"},
    )
    assert done.returncode == 2
    assert "`apt-get install python3-dev`" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / ".venv").exists()

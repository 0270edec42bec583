"""The helpers and the gate that the other tests trust."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import HostLock, anon_pages, rounds, spawn, wait_until

ROOT = Path(__file__).parents[2]

INNER = """
import pytest

@pytest.mark.kernel
def test_kernel():
    pass

@pytest.mark.root
def test_root(ksmd):
    pass

def test_plain():
    pass
"""


def inner(folder: Path, value: str | None, probe: str) -> str:
    """Run three tests on a machine whose probe says this, and return what pytest printed."""
    pretend = f"import support\nsupport._PROBES['ksm'] = lambda: {probe!r}\n"
    original = (ROOT / "conftest.py").read_text()
    _docstring, future, rest = original.partition("from __future__ import annotations\n")
    (folder / "conftest.py").write_text(future + pretend + rest)
    (folder / "test_inner.py").write_text(INNER)
    environment = {key: text for key, text in os.environ.items() if key != "PYKSM_KERNEL_TESTS"}
    if value is not None:
        environment["PYKSM_KERNEL_TESTS"] = value
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c"]
        + [ROOT / "pyproject.toml", "--rootdir", folder, folder],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    return done.stdout + done.stderr


def test_unset_skips_with_a_reason_and_the_way_to_force_it(tmp_path: Path) -> None:
    said = inner(tmp_path, None, "this kernel has no KSM")
    assert "1 passed, 2 skipped" in said
    assert "this kernel has no KSM (PYKSM_KERNEL_TESTS=1 makes this an error)" in said


def test_one_makes_what_is_missing_an_error(tmp_path: Path) -> None:
    said = inner(tmp_path, "1", "this kernel has no KSM")
    assert "1 passed, 2 errors" in said
    assert "PYKSM_KERNEL_TESTS=1, but this kernel has no KSM" in said


def test_zero_runs_no_kernel_test(tmp_path: Path) -> None:
    said = inner(tmp_path, "0", "")
    assert "1 passed, 2 skipped" in said


def test_any_other_value_is_refused(tmp_path: Path) -> None:
    assert "leave it unset" in inner(tmp_path, "yes", "")


def test_wait_until_returns_the_value() -> None:
    values = iter([0, "", [], 7])
    assert wait_until(lambda: next(values)) == 7


def test_wait_until_gives_up_and_says_for_what() -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"waited 0.05 s in vain for the moon"):
        wait_until(lambda: False, 0.05, what="the moon")
    assert 0.05 <= time.monotonic() - started < 5


def _echo(greeting):
    say(greeting)  # noqa: F821
    for words in commands():  # noqa: F821
        say(*reversed(words))  # noqa: F821


def test_spawn_talks_by_lines() -> None:
    with spawn(_echo, "ready") as child:
        child.expect("ready")
        assert child.ask("a", 2) == "2 a"
        assert child.finish() == 0


def test_spawn_kills_what_it_started() -> None:
    with spawn("say('ready')\nimport time\nwhile True: time.sleep(60)") as child:
        child.expect("ready")
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_spawn_shows_the_childs_traceback() -> None:
    with (
        spawn("raise SystemExit('broken')") as child,
        pytest.raises(AssertionError, match="broken"),
    ):
        child.reply()


def test_spawn_does_not_wait_for_ever() -> None:
    with (
        spawn("import time; time.sleep(60)") as child,
        pytest.raises(AssertionError, match=r"said nothing for 0.05 s"),
    ):
        child.reply(timeout=0.05)


def test_the_lock_excludes_another_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def other(path):
        import pathlib

        import support

        try:
            support.HostLock(pathlib.Path(path)).acquire(timeout=0.05)
        except TimeoutError as error:
            say(error)  # noqa: F821
        else:
            say("taken")  # noqa: F821

    with HostLock(path).hold(), spawn(other, str(path)) as child:
        assert "another run of pyksm's tests has held" in child.reply()
    with spawn(other, str(path)) as child:
        child.expect("taken")


def test_the_lock_is_taken_over_from_the_flock_command(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import pathlib, support; "
        f"support.HostLock(pathlib.Path({str(path)!r})).acquire(timeout=1); print('mine')"
    )
    done = subprocess.run(
        ["flock", path, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    )
    assert done.stdout == "mine\n", done.stderr


def test_anon_pages_is_in_bytes() -> None:
    assert anon_pages() > 1 << 20


def test_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYKSM_CAMPAIGN", raising=False)
    assert rounds(3, 200) == 3
    monkeypatch.setenv("PYKSM_CAMPAIGN", "1")
    assert rounds(3, 200) == 200

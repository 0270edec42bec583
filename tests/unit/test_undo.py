from __future__ import annotations

import gc
import os
import threading

import pytest

from pyksm import Undo


def test_undoes_once_from_any_thread() -> None:
    calls: list[int] = []
    undo = Undo(lambda: calls.append(1))
    threads = [threading.Thread(target=undo.undo) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    undo.undo()
    assert calls == [1]


def test_runs_when_the_body_raises_and_keeps_its_error() -> None:
    def revert() -> None:
        raise OSError("cannot")

    with pytest.raises(ValueError, match="body") as caught, Undo(revert):
        raise ValueError("body")
    assert "could not undo" in caught.value.__notes__[0]


def test_a_failed_undo_can_be_tried_again() -> None:
    failures = [OSError("first")]

    def revert() -> None:
        if failures:
            raise failures.pop()

    undo = Undo(revert)
    with pytest.raises(OSError, match="first"):
        undo.undo()
    assert "stands" in repr(undo)
    undo.undo()
    assert "undone" in repr(undo)


def test_a_thrown_away_undo_keeps_the_change() -> None:
    events: list[str] = []
    Undo(lambda: events.append("reverted"), keep=lambda: events.append("kept"))
    gc.collect()
    assert events == ["kept"]


def test_an_undone_one_is_not_kept_as_well() -> None:
    events: list[str] = []
    undo = Undo(lambda: events.append("reverted"), keep=lambda: events.append("kept"))
    undo.undo()
    del undo
    gc.collect()
    assert events == ["reverted"]


def test_does_nothing_in_a_forked_child() -> None:
    calls: list[int] = []
    undo = Undo(lambda: calls.append(1))
    child = os.fork()
    if child == 0:
        undo.undo()
        os._exit(len(calls))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    undo.undo()
    assert calls == [1]


def test_all_undoes_the_last_first_and_every_one() -> None:
    events: list[int] = []

    def failing() -> None:
        events.append(2)
        raise OSError("second")

    undo = Undo.all([Undo(lambda: events.append(1)), Undo(failing), Undo(lambda: events.append(3))])
    with pytest.raises(OSError, match="second"):
        undo.undo()
    assert events == [3, 2, 1]


def test_all_groups_several_errors() -> None:
    def failing() -> None:
        raise OSError("no")

    with pytest.raises(ExceptionGroup, match="several") as caught:
        Undo.all([Undo(failing), Undo(failing)]).undo()
    assert len(caught.value.exceptions) == 2


def test_all_keeps_its_parts_when_thrown_away() -> None:
    kept: list[int] = []
    Undo.all([Undo(lambda: None, keep=lambda: kept.append(1)) for _ in range(2)])
    gc.collect()
    assert kept == [1, 1]


def test_one_that_was_entered_is_never_kept() -> None:
    """An exception in the first bytecodes of __exit__ drops it without undoing."""
    kept: list[int] = []
    Undo(lambda: None, keep=lambda: kept.append(1)).__enter__()
    gc.collect()
    assert not kept

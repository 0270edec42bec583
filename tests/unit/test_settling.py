from __future__ import annotations

from pyksm.settling import Convergence, explain


def laps_until_done(before: int, *merged: int) -> int:
    convergence = Convergence(before)
    for lap, figure in enumerate(merged, 1):
        if convergence.lap_ended(figure):
            return lap
    return 0


def test_a_lap_that_brings_nothing_ends_it() -> None:
    assert laps_until_done(0, 0, 500, 500, 500) == 3
    assert laps_until_done(0, 0, 0, 500, 500) == 4


def test_while_laps_still_merge_it_goes_on() -> None:
    assert laps_until_done(0, 100, 200, 300, 400, 500) == 0


def test_nothing_merged_at_all_waits_a_lap_more() -> None:
    assert laps_until_done(0, 0, 0, 0, 0) == 4
    assert laps_until_done(0, 0, 0, 0, 700, 700) == 5
    assert laps_until_done(300, 300, 300, 300, 300) == 4


def test_memory_that_merges_and_breaks_for_ever_is_not_waited_for() -> None:
    assert laps_until_done(0, 100_000, 100_040, 100_010) == 3


def test_what_did_not_merge_is_named_only_where_there_is_some() -> None:
    assert [u.code for u in explain(unmarked=1, untouched=0, single=4096)] == ["unmarked", "single"]

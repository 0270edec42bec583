from __future__ import annotations

import pytest
from fakeksm import Kernel
from hypothesis import given
from hypothesis import strategies as st

from pyksm.knobs import KNOBS, check, from_file, plan, resolve, spins

values = {
    "run": st.integers(0, 2),
    "pages_to_scan": st.integers(0, 10**6),
    "sleep_millisecs": st.integers(0, 1000),
    "smart_scan": st.integers(0, 1),
    "use_zero_pages": st.integers(0, 1),
    "advisor_min_pages_to_scan": st.integers(0, 10**6),
    "advisor_mode": st.sampled_from(["none", "scan-time"]),
}
originals = st.fixed_dictionaries(values)
requests = st.lists(st.fixed_dictionaries({}, optional=values), max_size=5)


def plain(original, asked):
    """Tell whether the advisor and the guard against spinning stay out of it."""
    return "scan-time" not in (original["advisor_mode"], *(r.get("advisor_mode") for r in asked))


@given(originals)
def test_without_requests_the_original_is_the_target(original):
    assert resolve(original, []) == original


@given(originals, requests)
def test_the_strongest_request_wins_knob_by_knob(original, asked):
    target = resolve(original, asked)
    for name in target:
        wanted = [request[name] for request in asked if name in request]
        if not wanted:
            if name != "sleep_millisecs":
                assert target[name] == original[name]
        elif name in ("run", "pages_to_scan", "use_zero_pages", "advisor_min_pages_to_scan"):
            assert target[name] == max(wanted)
        elif name == "smart_scan":
            assert target[name] == min(wanted)
        elif name == "advisor_mode":
            assert target[name] == wanted[-1]


@given(originals, requests)
def test_order_matters_to_the_advisor_alone(original, asked):
    forward, backward = resolve(original, asked), resolve(original, asked[::-1])
    if plain(original, asked):
        assert forward == backward


@given(originals, requests)
def test_it_never_makes_ksmd_spin(original, asked):
    assert spins(original) or not spins(resolve(original, asked))


def test_two_requests_that_together_would_spin_leave_the_sleep_alone():
    original = {"pages_to_scan": 100, "sleep_millisecs": 20}
    target = resolve(original, [{"pages_to_scan": 0}, {"sleep_millisecs": 0}])
    assert target == {"pages_to_scan": 0, "sleep_millisecs": 20}


@given(originals, requests)
def test_the_plan_leads_a_kernel_to_the_target_and_back(original, asked):
    kernel = Kernel(**original)
    before = kernel.read()
    for wanted in (resolve(original, asked), resolve(original, [])):
        for name, value in plan(kernel.read(), wanted):
            kernel.write(name, value)
        now = kernel.read()
        ruled = now["advisor_mode"] == "scan-time"
        same = {n: v for n, v in wanted.items() if not (ruled and n == "pages_to_scan")}
        assert same.items() <= now.items()
    # An advisor's number comes back too, unless somebody else's request met it while it was on.
    if not any("pages_to_scan" in request for request in asked) or plain(original, asked):
        assert kernel.read() == before


@given(originals, requests)
def test_ksmd_stops_first_and_starts_last(original, asked):
    target = resolve(original, asked)
    names = [name for name, _ in plan(Kernel(**original).read(), target)]
    if "run" in names:
        assert names.index("run") == (len(names) - 1 if target["run"] == 1 else 0)


def test_a_value_set_twice_is_written_once():
    assert plan({"run": 1, "pages_to_scan": 5}, {"run": 1, "pages_to_scan": 5}) == []


@pytest.mark.parametrize(
    ("wanted", "error", "says"),
    [
        ({}, ValueError, "no knob was named"),
        ({"page_to_scan": 1}, ValueError, "Did you mean pages_to_scan?"),
        ({"colour": 1}, ValueError, "The knobs are run, pages_to_scan"),
        ({"pages_to_scan": 1.5}, TypeError, "float 1.5"),
        ({"pages_to_scan": "100"}, TypeError, "str '100'"),
        ({"pages_to_scan": True}, TypeError, "not True"),
        ({"run": True}, TypeError, "not True"),
        ({"pages_to_scan": None}, TypeError, "NoneType"),
        ({"pages_to_scan": -1}, ValueError, "0 to 4294967295, not -1"),
        ({"pages_to_scan": 2**32}, ValueError, "4294967296"),
        ({"run": 3}, ValueError, "0 to 2"),
        ({"smart_scan": 2}, ValueError, "0 to 1"),
        ({"max_page_sharing": 1}, ValueError, "2 to 2147483647"),
        ({"advisor_max_cpu": 2**32 + 1}, ValueError, "1 to 100"),
        ({"advisor_max_cpu": 101}, ValueError, "1 to 100"),
        ({"advisor_target_scan_time": 0}, ValueError, "1 to"),
        ({"advisor_mode": "fast"}, ValueError, "'none' or 'scan-time'"),
        ({"advisor_mode": 1}, TypeError, "'none' or 'scan-time'"),
        ({"advisor_mode": "scan-time", "pages_to_scan": 5}, ValueError, "together"),
        ({"pages_to_scan": 0, "sleep_millisecs": 0}, ValueError, "burn a whole core"),
    ],
)
def test_bad_requests_say_what_is_wrong(wanted, error, says):
    with pytest.raises(error, match=says.replace("?", r"\?")):
        check(wanted)


def test_switches_take_bools_and_numbers_come_back_as_ints():
    np = pytest.importorskip("numpy")
    checked = check({"smart_scan": False, "use_zero_pages": True, "pages_to_scan": np.int64(7)})
    assert checked == {"smart_scan": 0, "use_zero_pages": 1, "pages_to_scan": 7}
    assert all(type(value) is int for value in checked.values())


def test_a_file_may_hold_what_an_administrator_could_set():
    assert from_file("advisor_max_cpu", 4_000_000_000)
    assert from_file("advisor_mode", "scan-time")
    for name, value in [
        ("run", 3),
        ("run", True),
        ("run", "1"),
        ("run", -1),
        ("pages_to_scan", 2**32),
        ("../../etc/passwd", 1),
        ("advisor_mode", 1),
        ("advisor_mode", ["none"]),
        (5, 5),
    ]:
        assert not from_file(name, value)


def test_every_knob_names_its_kernel():
    assert all(knob.since for knob in KNOBS.values())

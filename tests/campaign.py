"""Kill processes amid their changes of knobs, and look whether the knobs come back.

Each round starts four processes at once that ask for random knobs, nest and overlap, and ends
each by SIGKILL, SIGTERM or an exception at a random moment. Then one call of pyksm must find
every knob as it was.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

WORKER = """
import random, signal, sys, time
from pyksm.host import Host
root, lease, seed, how = sys.argv[1:]
chance = random.Random(int(seed))

class Ended(Exception):
    pass

# Between the call of tune() and its `with`, and in the first lines of the undoing, an exception
# leaves an Undo that nobody holds: by the grammar of pyksm that keeps the change. So there the
# exception comes a moment later; anywhere else, also amid the lease's own work, it comes at once.
NOT_HERE = {"__init__", "__enter__", "__exit__", "__del__", "undo", "revert", "tune", "nest"}

def end(number, frame):
    if frame.f_code.co_name in NOT_HERE:
        signal.setitimer(signal.ITIMER_REAL, 0.0003)
    else:
        raise Ended

if how == "exception":
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGALRM, end)

def choose():
    knobs = {
        "run": chance.choice([0, 1, 1, 2]),
        "pages_to_scan": chance.choice([1, 50, 1000, 5000]),
        "sleep_millisecs": chance.choice([1, 10, 500]),
        "smart_scan": chance.choice([0, 1]),
        "use_zero_pages": chance.choice([0, 1]),
        "max_page_sharing": chance.choice([256, 300]),
        "advisor_max_cpu": chance.choice([10, 90]),
        "advisor_mode": chance.choice(["none", "scan-time"]),
    }
    names = chance.sample(sorted(knobs), chance.randint(1, 4))
    return {name: knobs[name] for name in names}

host = Host(root, lease=lease)

def work():
    time.sleep(chance.random() * 0.005)

def nest(depth):
    try:
        undo = host.tune(**choose())
    except (OSError, ValueError) as error:
        if isinstance(error, TimeoutError):
            raise
        return  # pages_to_scan under the advisor: refused, and nothing changed
    with undo:
        work()
        if depth:
            nest(depth - 1)

print("ready", flush=True)
try:
    while True:
        nest(chance.randint(0, 3))
except Ended:
    pass
"""


def wait_for(worker: subprocess.Popen[bytes]) -> bytes:
    """Return what a worker said; send the signal again where a callback swallowed the exception."""
    for _ in range(30):
        try:
            errors = worker.communicate(timeout=2)[1]
        except subprocess.TimeoutExpired:
            worker.send_signal(signal.SIGTERM)
        else:
            return b"" if b"Exception ignored" in errors else errors
    worker.kill()
    return b"did not end: " + worker.communicate()[1]


def run_campaign(root: Path, lease: Path, rounds: int, look, seed: int = 0) -> list[str]:
    """Return what was wrong, one line for each round that left a knob changed."""
    from pyksm.host import Host

    chance = random.Random(seed)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    before = look()
    wrong = []
    host = Host(root, lease=lease)
    for number in range(rounds):
        workers = []
        for _ in range(4):
            how = chance.choice(["SIGKILL", "SIGTERM", "exception"])
            command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", WORKER]
            command += [str(root), str(lease), str(chance.getrandbits(32)), how]
            worker = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
            )
            workers.append((worker, how))
        for worker, _ in workers:
            assert worker.stdout is not None
            worker.stdout.readline()
        for worker, how in chance.sample(workers, len(workers)):
            time.sleep(chance.random() * 0.02)
            worker.send_signal(signal.SIGKILL if how == "SIGKILL" else signal.SIGTERM)
        for worker, how in workers:
            errors = wait_for(worker)
            if errors:
                wrong.append(f"round {number}: a worker ({how}) said {errors.decode()}")
        host.restore()
        status = host.lease_status()
        left = {name: value for name, value in look().items() if value != before[name]}
        if left or status.requests or status.original or status.foreign:
            wrong.append(f"round {number}: left {left}, {status}")
    host.close()
    return wrong

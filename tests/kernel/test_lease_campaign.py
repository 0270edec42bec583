"""The fault campaign on this machine's kernel; PYKSM_CAMPAIGN_ROUNDS=200 is the long form."""

from __future__ import annotations

import os

import pytest
from campaign import run_campaign
from support import SYSFS, knobs

ROUNDS = int(os.environ.get("PYKSM_CAMPAIGN_ROUNDS", "10"))


@pytest.mark.kernel("knobs")
@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * ROUNDS)
def test_every_knob_comes_back(tmp_path):
    assert run_campaign(SYSFS, tmp_path / "lease", ROUNDS, knobs) == []

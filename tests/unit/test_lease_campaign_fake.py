"""The fault campaign on a folder: needs no root."""

from __future__ import annotations

import os

import pytest
from campaign import run_campaign
from fakeksm import make_sysfs, shown

ROUNDS = int(os.environ.get("PYKSM_CAMPAIGN_ROUNDS", "5"))


@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * ROUNDS)
def test_every_knob_comes_back(tmp_path):
    root = make_sysfs(tmp_path / "ksm")
    assert run_campaign(root, tmp_path / "lease", ROUNDS, lambda: shown(root), seed=1) == []

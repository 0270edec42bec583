"""What the benchmarks share."""

from __future__ import annotations

import pytest


@pytest.fixture
def slack(request: pytest.FixtureRequest) -> float:
    """Return how far a ratio may be over its bar: not at all when measuring, twice in a quick run.

    ``make bench`` holds the project to its figures; ``make bench-quick`` runs on machines that do
    other things meanwhile, and is to notice what rots.
    """
    return 2.0 if request.config.getoption("benchmark_disable") else 1.0

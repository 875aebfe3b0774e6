"""A server of the default model outlasts clients that misbehave: `scripts/soak_server` in short."""

import pytest
from soak_server import soak

pytestmark = pytest.mark.unoptimized


@pytest.mark.slow
def test_64_clients_good_and_bad_leak_nothing():
    report = soak(64, 20.0)
    assert report["wrong"] == []
    assert report["left_running"] == 0
    assert report["exit_code"] == 0
    assert report["outcomes"]["read to the end"] > 0
    refused = {name.removeprefix("401, ") for name in report["outcomes"] if name.startswith("401")}
    assert refused == {"no key", "no key's form", "unknown id", "another's secret", "revoked"}
    assert report["keys_seen_in"] == []
    assert sum(report["outcomes"].values()) > 64
    before, after = report["memory_mb"]
    assert after < before + 150

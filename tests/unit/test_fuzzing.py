"""The fuzzer's targets, for a minute each; see scripts/fuzz."""

import subprocess
from pathlib import Path

import pytest

NO_WHEEL = 69
SCRIPT = Path(__file__).parents[2] / "scripts/fuzz"


@pytest.mark.long
@pytest.mark.parametrize(
    "target", ["tar", "manifest", "config", "reference", "archive", "lane", "pyfuse3"]
)
def test_what_coverage_leads_to_is_read_or_refused(target: str) -> None:
    done = subprocess.run([SCRIPT, "60", target], capture_output=True, text=True)
    if done.returncode == NO_WHEEL:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

"""A few `kill -9` over a loop of seconds; `scripts/kill_loop.py` does as many as one likes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/kill_loop.py"


@pytest.mark.slow
def test_a_killed_loop_ends_with_the_ledger_of_an_unkilled_one(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "3", "--rounds", "1", "--out", tmp_path / "loops"],
        capture_output=True, text=True, timeout=570,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # A resumed loop may be over before the third.
    assert re.search("[1-3] kills, 8 records: ledgers equal", done.stdout), done.stdout

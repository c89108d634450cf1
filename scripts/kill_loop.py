"""Kill a tiny loop again and again, at random moments, and compare its ledger with an unkilled one.

    python scripts/kill_loop.py --kills 20 --out /tmp/kill-loop

No simulator: a second small world stands for the truth, so that every stage takes seconds. Exits
with code 1 where the ledgers differ. Prints how long a resumed loop took to its first useful work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/rl"))

from loop_home import make_home

from worldloop.config import config_to_dict
from worldloop.episodes import EpisodeDataset
from worldloop.ledger import Ledger


def start(settings: Path, log: Path) -> subprocess.Popen[bytes]:
    """The loop as a process: begun, or resumed."""
    argv = [sys.executable, "-m", "worldloop", "loop", "--config", str(settings)]
    with open(log, "ab") as stream:
        return subprocess.Popen(argv, stdout=stream, stderr=stream)


def run_to_end(settings: Path, log: Path) -> float:
    """Run without a kill; seconds."""
    begun = time.monotonic()
    process = start(settings, log)
    if process.wait() != 0:
        raise SystemExit(f"the loop failed: {log.read_text()[-2000:]}")
    return time.monotonic() - begun


def settings_of(home: Path, folder: Path, rounds: int) -> Path:
    """A config file of `worldloop loop` for this folder."""
    values = {"out": str(folder), "rounds": rounds, **config_to_dict(make_home(home))}
    path = home / f"{folder.name}.json"
    path.write_text(json.dumps(values))
    return path


def traces(folder: Path) -> set[tuple[str, int]]:
    """Name and size of everything that stages wrote."""
    return {
        (str(path), path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "loop.json", "attempts.json")
    }


def useful_after(process: subprocess.Popen[bytes], folder: Path, limit: float) -> float | None:
    """Seconds until a stage writes something new; None where the limit or the end comes first."""
    begun, before = time.monotonic(), traces(folder)
    while time.monotonic() - begun < limit and process.poll() is None:
        if traces(folder) - before:
            return time.monotonic() - begun
        time.sleep(0.05)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kill-loop"))
    options = parser.parse_args()
    home = options.out
    if home.exists() and any(home.iterdir()) and not (home / "whole.log").is_file():
        parser.error(f"{home}: holds something else than loops to kill; name another folder")
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    whole, killed = home / "whole", home / "killed"
    seconds = run_to_end(settings_of(home, whole, options.rounds), home / "whole.log")
    print(f"unkilled: {seconds:.0f} s, {len(Ledger(whole).records)} records", flush=True)

    rng = random.Random(options.seed)
    settings, waits, kills = settings_of(home, killed, options.rounds), [], 0
    wanted = [record.digest for record in Ledger(whole).records]
    while kills < options.kills:
        process = start(settings, home / "killed.log")
        wait = useful_after(process, killed, 60)
        if wait is not None:
            waits.append(wait)
        # Anywhere from just begun to into the next stages; on average all kills fit into the run.
        until = time.monotonic() + rng.uniform(0, 1.2 * seconds / (options.kills + 1))
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is not None:
            if process.returncode != 0:
                print((home / "killed.log").read_text()[-2000:])
                return 1
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        finished = Ledger(killed).records
        print(f"kill {kills}: {len(finished)} records; first work after {wait or 0:.1f} s",
              flush=True)  # fmt: skip
        if [record.digest for record in finished] != wanted[: len(finished)]:
            print("a record differs from the unkilled run's")
            return 1
    run_to_end(settings, home / "killed.log")
    a, b = Ledger(whole), Ledger(killed)
    same = [r.digest for r in a.records] == [r.digest for r in b.records]
    for r in range(1, options.rounds + 1):
        seeds = EpisodeDataset(b.output(r, "collect", "episodes")).seeds
        same &= (
            len(set(seeds)) == len(seeds)
            and seeds == EpisodeDataset(a.output(r, "collect", "episodes")).seeds
        )
    waits.sort()
    print(f"{kills} kills, {len(b.records)} records: ledgers {'equal' if same else 'DIFFER'}")
    if waits:
        print(
            f"first work after a resume: median {waits[len(waits) // 2]:.1f} s, longest "
            f"{waits[-1]:.1f} s"
        )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

"""One tiny round of the closed loop on a CPU, in the simulator: `python examples/loop_tiny.py`.

Needs ManiSkill (`make setup-sim`); under ten minutes on two cores. Too small to improve anything:
it shows the API and every stage. Kill it and start it again, and it goes on where it was.
"""

from dataclasses import replace
from pathlib import Path

from worldloop import Loop, RoundConfig
from worldloop.rl.round_config import PRESETS
from worldloop.rl.starts import shipped_episodes


def main() -> None:
    _, smoke = PRESETS["smoke"]
    config: RoundConfig = replace(smoke, data=(shipped_episodes(),))
    loop = Loop(Path("runs/loop-example"), config)
    decision = loop.run(rounds=1)
    print(loop.status())
    print(decision.facts, loop.folder / "round-01/report.html")


if __name__ == "__main__":  # simulators run in processes of their own, which import this file
    main()

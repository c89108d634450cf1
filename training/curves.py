"""`worldloop train curves`: draw a run's metrics.jsonl as one PNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from worldloop.cli import parse_config
from worldloop.errors import UserError
from worldloop.files import atomic_path
from worldloop.track import read_rows


@dataclass(frozen=True)
class CurvesConfig:
    """Draw columns of a run against its steps, one panel for each `--columns` entry."""

    run: Path
    """Run folder, or a metrics.jsonl."""
    out: Path
    """PNG to write."""
    columns: tuple[str, ...] = ("flow,held_out_flow", "reward,held_out_reward")
    """One panel each; names of several curves in a panel are separated by commas."""
    log: bool = True
    """Logarithmic value axis."""


def draw(config: CurvesConfig) -> None:
    """Write the picture; raises UserError for a column that no row has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = config.run / "metrics.jsonl" if config.run.is_dir() else config.run
    rows = read_rows(path)
    known = {name for row in rows for name in row}
    width = 4.6 * len(config.columns)
    figure, panels = pyplot.subplots(1, len(config.columns), figsize=(width, 3.2), squeeze=False)
    for panel, names in zip(panels[0], config.columns, strict=True):
        for name in names.split(","):
            if name not in known:
                raise UserError(f"{path}: no column {name!r}; has {', '.join(sorted(known))}")
            points = [(row["step"], row[name]) for row in rows if name in row]
            panel.plot(*zip(*points, strict=True), label=name)
        panel.set_xlabel("step")
        if config.log:
            panel.set_yscale("log")
        panel.grid(alpha=0.3, which="both")
        panel.legend(frameon=False)
    figure.tight_layout()
    with atomic_path(config.out) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    config = parse_config(CurvesConfig, argv, prog="worldloop train curves")
    draw(config)
    print(config.out)
    return 0

"""`chiasm watch`: how far a study is, from its folder alone; and the dashboards of Optuna and Ray."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chiasm.errors import ConfigError

if TYPE_CHECKING:
    from chiasm_experiments.snapshot import CellScore, Snapshot, TrialState

MOST = 10
"""Cells, and failed trials, that are listed."""
QUIET_SECONDS = 120
"""Without a step for so long, a running trial is said to be quiet."""
CLEAR = "\x1b[H\x1b[2J\x1b[3J"


@click.command()
@click.argument("study", metavar="STUDY", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results, where STUDY is a file.")
@click.option("--once", is_flag=True, help="Print it once, and end.")
@click.option("--every", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="Seconds between looks.")
@click.option("--json", "as_json", is_flag=True, help="Print it once, as JSON for a machine.")
@click.option("--optuna", is_flag=True, help="Serve optuna-dashboard on the study's record instead.")
@click.option("--port", type=int, default=8080, show_default=True, help="Of optuna-dashboard.")
@click.option("--ray", is_flag=True, help="Say where the dashboard of the running Ray cluster is instead.")
def watch(
    study: Path, out: Path | None, once: bool, every: float, as_json: bool, optuna: bool, port: int, ray: bool
) -> None:
    """Show how far a study is: STUDY is its folder of results or its file.

    Trials by state, running ones with stage, step, loss, rate and time left, the best cells so far with 95% intervals
    over images and seeds, failures with their reason, and what was spent. It reads the study's folder and nothing
    else, so it works beside a driver on another machine that shares the folder. Ctrl-C ends it, and not the study.
    """
    if ray:
        click.echo(_ray_dashboard(as_json))
        return
    folder, storage = find(study, out)
    if optuna:
        _serve_optuna(folder, storage, port)
        return
    from chiasm_experiments.snapshot import look

    if as_json:
        click.echo(json.dumps(finite(look(folder, storage).values()), indent=2))
        return
    terminal = sys.stdout.isatty()
    try:
        while True:
            snapshot = look(folder, storage)
            size = shutil.get_terminal_size()
            text = as_text(snapshot, size.columns if terminal else 120, color=terminal)
            if terminal and not once:
                text = CLEAR + "\n".join(text.splitlines()[: size.lines - 1])
            click.echo(text, color=terminal)
            if once or not set(snapshot.counts) & {"running", "waiting"}:
                return
            time.sleep(every)
    except KeyboardInterrupt:
        return


def find(study: Path, out: Path | None = None) -> tuple[Path, str | None]:
    """The folder of a study's results, and the URL of its database if its file names one.

    Args:
        study: that folder, or the study's file.
        out: the folder, for a file whose results are not where they usually are.

    Raises:
        ConfigError: there are no results.
    """
    from chiasm_experiments.study.folder import STUDY, runs_folder

    if study.is_dir():
        folder, storage = study, None
    else:
        from chiasm_experiments.study.config import Study

        config = Study(study).config
        folder, storage = out or runs_folder() / config.name, config.storage
    folder = Path(os.path.abspath(folder))
    if not (folder / STUDY).is_file():
        raise ConfigError(
            f"{str(folder)!r} holds no study, or it has not begun; give the folder of its results, which $CHIASM_RUNS "
            "and --out of `chiasm sweep` decide"
        )
    return folder, storage


def as_text(snapshot: Snapshot, width: int = 120, *, color: bool = False) -> str:
    """A snapshot for a terminal.

    Args:
        snapshot: of a study.
        width: of a line, in columns.
        color: whether to use ANSI styles.
    """
    lines = [_style(f"{snapshot.name}  {snapshot.folder}", color, bold=True)]
    lines += [snapshot.question] if snapshot.question else []
    lines += [
        "",
        f"{len(snapshot.trials)} trials: " + ", ".join(f"{n} {state}" for state, n in snapshot.counts.items()),
    ]
    lines += [f"note: {note}" for note in snapshot.notes]
    sections = (
        ("running", [_running(trial) for trial in snapshot.of("running")]),
        ("best so far, 95% intervals over images and seeds", _table(_cells(snapshot))),
        ("failed", _failed(snapshot.of("failed"))),
        ("spent", [_spent(snapshot)]),
    )
    for title, rows in sections:
        if rows:
            lines += ["", _style(title, color, bold=True), *(f"  {row}" for row in rows)]
    return "\n".join(line if len(line) <= width or "\x1b" in line else line[: width - 1] + "…" for line in lines)


def _running(trial: TrialState) -> str:
    now = trial.progress
    if now is None:
        return f"{trial.name}  starting"
    steps = f"{now.step}/{now.steps}" if now.steps is not None else f"{now.step}"
    words = [f"{now.stage} {steps}", f"loss {now.loss:.3f}"]
    if now.step == now.steps:
        words = [f"{now.stage} done"]
    elif now.steps_per_second is not None:
        words.append(_rate(now.steps_per_second))
    if now.rung is not None:
        words.append(f"{100 * now.rung[1]:.1f} at rung {now.rung[0]}")
    if now.seconds_left:
        words.append(f"{_duration(now.seconds_left)} left of the stage")
    if now.quiet_seconds > QUIET_SECONDS:
        words.append(f"no step for {_duration(now.quiet_seconds)}")
    return f"{trial.name}  " + ", ".join(words)


def _cells(snapshot: Snapshot) -> Iterator[tuple[str, ...]]:
    shown = snapshot.cells[:MOST]
    benchmarks = sorted({name for cell in shown for name in cell.benchmarks})
    several = len({cell.fidelity for cell in snapshot.cells}) > 1
    if shown:
        yield "cell", *(["fidelity"] if several else []), "seeds", *benchmarks
    for cell in shown:
        yield cell.label, *([cell.fidelity] if several else []), str(cell.seeds), *(_score(cell, n) for n in benchmarks)
    if len(snapshot.cells) > MOST:
        yield (f"and {len(snapshot.cells) - MOST} more cells",)


def _score(cell: CellScore, benchmark: str) -> str:
    from chiasm_experiments.report.format import accuracy

    return accuracy(cell.benchmarks.get(benchmark))


def _failed(trials: list[TrialState]) -> list[str]:
    more = [f"and {len(trials) - MOST} more"] if len(trials) > MOST else []
    return [f"{trial.name}  {trial.error}" for trial in trials[:MOST]] + more


def _spent(snapshot: Snapshot) -> str:
    hours = {on_gpu: sum(t.hours for t in snapshot.trials if t.on_gpu is on_gpu) for on_gpu in (True, False)}
    words = [f"{hours[True]:.2f} GPU-hours"] if hours[True] else []
    words += [f"{hours[False]:.2f} CPU-hours"] if hours[False] or not words else []
    most, money, price = (snapshot.budget.get(name) for name in ("gpu_hours", "money", "price_per_gpu_hour"))
    words += [f"of {most:g} in all"] if most else []
    words += [f"{sum(hours.values()) * price:.2f} of {money:g} paid"] if money and price else []
    return ", ".join(words)


def _table(rows: Iterator[tuple[str, ...]]) -> list[str]:
    table = list(rows)
    columns = max(map(len, table), default=0)
    widths = [max(len(row[i]) for row in table if len(row) == columns) for i in range(columns)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False)).rstrip()
        if len(row) > 1
        else row[0]
        for row in table
    ]


def _style(text: str, color: bool, **style: bool) -> str:
    return click.style(text, **style) if color else text


def _rate(steps_per_second: float) -> str:
    return f"{steps_per_second:.2f} steps/s" if steps_per_second >= 1 else f"{1 / steps_per_second:.1f} s/step"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def finite(value: object) -> object:
    """Plain values without NaN and infinities, for which JSON has no number."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _serve_optuna(folder: Path, storage: str | None, port: int) -> None:
    """Runs optuna-dashboard until Ctrl-C.

    Raises:
        ConfigError: it is not installed, or the study has no record yet.
    """
    from chiasm_experiments.study.folder import JOURNAL

    try:
        from optuna_dashboard import run_server
    except ImportError:
        raise ConfigError("optuna-dashboard is not installed: pip install 'chiasm-experiments[dashboard]'") from None
    from chiasm_experiments.study.storage import open_storage

    if storage is None and not (folder / JOURNAL).is_file():
        raise ConfigError(
            f"{str(folder)!r} has no {JOURNAL}; if Optuna's record is in a database, give the file of the study, which "
            "names it"
        )
    click.echo(f"optuna-dashboard: http://127.0.0.1:{port} (Ctrl-C ends it)")
    with contextlib.suppress(KeyboardInterrupt):
        # the storage and not its path: what is written on a dashboard keeps to the locks of the drivers
        run_server(open_storage(storage, folder), host="127.0.0.1", port=port)


def _ray_dashboard(as_json: bool) -> str:
    """Where the dashboard of the running Ray cluster is.

    Raises:
        SubmissionError: no cluster runs, or it runs without a dashboard.
    """
    from chiasm_experiments.submit import SubmissionError, connect

    try:
        address = connect(None).get_address()
    except SubmissionError as error:
        error.add_note(
            "A sweep that starts Ray by itself does so without a dashboard: `ray start --head` once, and "
            "`RAY_ADDRESS=auto chiasm sweep STUDY`, or `chiasm submit STUDY`."
        )
        raise
    return json.dumps({"dashboard": address}) if as_json else f"Ray's dashboard: {address}"

"""What lies in the folder of a study, and where that folder is.

study.json        what the study is and which trials belong to it
optuna.journal    Optuna's record, unless a database holds it
drivers/          a file for each process that drives the study, locked and touched while it lives
stages/           results of stages that trials have in common
trials/NAME/      one trial: run.json, manifest.json, questions.parquet, curve.json, metrics.jsonl, checkpoints
"""

from __future__ import annotations

import os
from pathlib import Path

STUDY, JOURNAL, DRIVERS, TRIALS, STAGES, LOCK = (
    "study.json",
    "optuna.journal",
    "drivers",
    "trials",
    "stages",
    ".study.lock",
)
RUNS_VARIABLE = "CHIASM_RUNS"
"""Environment variable: the folder of all results."""


def runs_folder() -> Path:
    """Where results go: `$CHIASM_RUNS`, else `runs` here, else in the home folder for a submitted job.

    A job that was submitted with a working directory runs in a temporary copy of it, which is deleted later.
    """
    if folder := os.environ.get(RUNS_VARIABLE):
        return Path(folder).expanduser().absolute()
    here = Path.cwd()
    return Path.home() / "chiasm-runs" if "working_dir_files" in here.parts else here / "runs"

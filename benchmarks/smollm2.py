"""The SmolLM2 study on a GPU: does a pretrained encoder beat a random one with a real language model behind it?

    python benchmarks/smollm2.py [STUDY_FOLDER]

Runs experiments/studies/smollm2.yaml, or takes the folder of a run that has ended, and records its report's numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, write_result

from chiasm_experiments.report import Interval, write_report

STUDY = "experiments/studies/smollm2.yaml"


def main() -> None:
    if len(sys.argv) > 1:
        record(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory(prefix="chiasm-smollm2-") as folder:
        env = {**os.environ, "CHIASM_RUNS": folder}
        subprocess.run([sys.executable, "-m", "chiasm.cli", "sweep", STUDY], env=env, cwd=ROOT, check=True)
        record(Path(folder) / "smollm2")


def record(folder: Path) -> None:
    report = write_report(folder)
    (analysis,) = report.analyses
    trials = report.study.complete
    effects = {effect.factor: effect for effect in analysis.effects}
    (pretrained,) = (
        item for item in effects["vision.encoders"].against("EfficientNet-Lite0") if item.b == "random weights"
    )
    assert analysis.control is not None, "the study has a control"
    manifests = [json.loads((trial.folder / "manifest.json").read_text()) for trial in trials]
    environment = manifests[0]["environment"]
    shutil.copy(report.figure, RESULTS / "smollm2.png")
    write_result(
        "smollm2",
        figures={
            "question": report.study.question,
            "trials_complete": len(trials),
            "trials_planned": report.study.planned,
            "questions": len(analysis.scores.questions),
            "images": analysis.scores.images,
            "chance": float(analysis.scores.chance.mean()),
            "accuracy_by_cell": {cell.label: interval(cell.accuracy) for cell in analysis.cells},
            "control_minus_chance": interval(analysis.control.minus_chance),
            "differences": {
                f"{factor}: {item.a} - {item.b}": interval(item.difference)
                | {"p_holm": item.p_holm, "verdict": item.verdict}
                for factor, effect in effects.items()
                for item in effect.comparisons
            },
            "accuracy_by_trial": {manifest["trial"]: manifest["scores"]["world"] for manifest in manifests},
            "peak_gpu_bytes": max(manifest["peak_gpu_bytes"] or 0 for manifest in manifests),
            "train_s_by_trial": sorted(manifest["seconds"]["train"] for manifest in manifests),
        },
        asked="a pretrained encoder beats the same with random weights, the interval excludes 0, and the control is at "
        "chance; differences that are not decided are reported as undecided",
        met=pretrained.verdict == "better" and analysis.control.verdict == "at chance",
        machine=f"{environment['gpu']}, {environment['cpu_threads']} CPU threads for each trial",
        versions={"python": environment["python"]} | environment["packages"],
    )


def interval(value: Interval) -> dict[str, Any]:
    return {name: asdict(value)[name] for name in ("estimate", "low", "high")}


if __name__ == "__main__":
    main()

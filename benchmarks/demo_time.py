"""How long the demo's sweep takes, without installing: at most 5 minutes on 2 cores.

python benchmarks/demo_time.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, write_result


def main() -> None:
    study = "experiments/studies/demo.yaml"
    with tempfile.TemporaryDirectory(prefix="chiasm-demo-") as folder:
        started = time.monotonic()
        env = {**os.environ, "CHIASM_RUNS": folder}
        subprocess.run([sys.executable, "-m", "chiasm.cli", "sweep", study], env=env, cwd=ROOT, check=True)
        seconds = time.monotonic() - started
        manifests = [json.loads(file.read_text()) for file in Path(folder).glob("*/trials/*/manifest.json")]
    by_cell: dict[str, list[float]] = {}
    for manifest in manifests:
        by_cell.setdefault(", ".join(manifest["cell"].values()), []).append(manifest["scores"]["world"])
    write_result(
        "demo_time",
        figures={
            "sweep_s": seconds,
            "trials": len(manifests),
            "accuracy_by_cell": by_cell,
            "trial_s": sorted(manifest["seconds"]["total"] for manifest in manifests),
        },
        asked="the demo's sweep takes at most 300 s on 2 cores",
        met=seconds <= 300,
    )


if __name__ == "__main__":
    main()

"""The benchmarks of training speed on one GPU, one after the other, each in a process of its own, within ten minutes.

Each has a time of its own, after which it is stopped and the next one runs; a table says what was found.

    python benchmarks/gpu_training.py                          all of them
    python benchmarks/gpu_training.py --only packing data_path
    python benchmarks/gpu_training.py --tiny                   anywhere, small models; writes no result
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import RESULTS

HERE = Path(__file__).parent
SECONDS = {"stage1_135m": 150, "cache_two_encoders": 130, "packing": 130, "data_path": 90, "cost_growth": 170}
"""Each benchmark's time, in the order in which they run: the data path is compared with what stage 1 has found."""
IN_ALL = 580.0


def run(name: str, tiny: bool, seconds: float) -> str:
    """What became of one benchmark: `done`, or why there is no result."""
    command = [sys.executable, str(HERE / f"{name}.py"), *["--tiny"] * tiny]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with its loader processes
        process.wait()
        return f"stopped after {seconds:.0f} s"
    return "done" if code == 0 else f"failed with {code}"


def found(name: str, since: float) -> str:
    """The ratio of a result that was written since, and whether it is what was asked."""
    file = RESULTS / f"{name}.json"
    if not file.is_file() or file.stat().st_mtime < since:
        return "no result"
    result = json.loads(file.read_text())
    return f"{result['ratio']:.3g}  {'met' if result['met'] else 'short'}  ({result['asked']})"


def main(names: list[str], tiny: bool) -> int:
    """Runs them; how many did not end well."""
    started, rows, failed = time.time(), [], 0
    for name in names:
        begun = time.time()
        state = run(name, tiny, min(SECONDS[name], max(1.0, IN_ALL - (begun - started))))
        failed += state != "done"
        told = "" if tiny or state != "done" else found(name, begun)
        rows.append(f"{name:<20} {state:<20} {time.time() - begun:5.0f} s  {told}")
    print("\n" + "\n".join(rows), flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS), metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="small models, anywhere; writes no result")
    given = parser.parse_args()
    sys.exit(main(given.only, given.tiny))

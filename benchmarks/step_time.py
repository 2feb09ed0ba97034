"""Where the time of a training step goes: stage 1 with 135M as in stage1_135m.py, with features kept and without.

Prints of a few steps that torch's profiler traced: how long they took, how long the GPU was at work, its costliest
kernels and copies, and the calls to its driver that held the host up. A step that takes longer than the GPU works
waits for the host, and the calls say where. Writes no result; tracing makes steps a little longer.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --run experiments/recipes/demo.yaml    of the first stage of any run
    python benchmarks/step_time.py --tiny    anywhere, small models
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from speed import Scale, asked_scale, captions, free, loop, make_run

from chiasm.config import load_run
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.files import METRICS
from chiasm_experiments.training.local import run_here
from chiasm_experiments.training.run import Job

STEPS = 4
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
HOST = {"cuda_runtime", "cuda_driver"}
ROWS = 12


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what spans cover together."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def costliest(events: Iterable[dict[str, Any]]) -> list[tuple[str, float, int]]:
    """Name, milliseconds of a step and calls of a step."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        times[event["name"]].append(event["dur"])
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))[:ROWS]
    return [(name, sum(each) / STEPS / 1000, len(each) // STEPS) for name, each in ranked]


def tell(name: str, events: list[dict[str, Any]]) -> None:
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    steps = [event for event in spans if event["name"].startswith("ProfilerStep") and event["cat"] == "user_annotation"]
    first, last = min(e["ts"] for e in steps), max(e["ts"] + e["dur"] for e in steps)
    on_gpu = [event for event in spans if event["cat"] in ON_GPU]
    at_work = busy((event["ts"], event["ts"] + event["dur"]) for event in on_gpu)
    print(f"\n{name}: traced, a step takes the host {(last - first) / STEPS / 1000:.1f} ms, ", end="")
    print(f"the GPU works {at_work / STEPS / 1000:.1f} ms of it")
    for title, kind in (("on the GPU", ON_GPU), ("the host in the driver", HOST), ("the host in torch", {"cpu_op"})):
        print(f"  {title}, ms of a step and calls")
        for what, ms, calls in costliest(event for event in spans if event["cat"] in kind):
            print(f"    {ms:8.2f} {calls:6d}  {what[:100]}")


def main(scale: Scale) -> None:
    batch, images = (4, 32) if scale.tiny else (64, 1024)
    settings = {"compile": "off", "loader_workers": 2} if scale.tiny else {"compile": "on", "loader_workers": 8}
    run = make_run("135m", batch, scale)
    with captions(images) as data, tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        for name, cache in (("features kept", "on"), ("encoded anew", "off")):
            # the first epoch of features that are kept encodes them: a run before it does that
            kept = {"cache_folder": f"{folder}/kept"}
            if cache == "on":
                loop(run, data, 1, cache=cache, **kept, **settings)
            found = loop(run, data, 1, trace=trace, cache=cache, profile=STEPS, **kept, **settings)
            tell(name, json.loads(trace.read_text())["traceEvents"])
            print(f"  untraced steps: {found['samples_per_second']:.0f} samples a second")
            free()


def of_run(file: Path) -> None:
    """The first stage of a run as it stands, with features kept and without; and its whole time."""
    run = load_run(file)
    for cache in ("on", "off"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            settings = Execution.model_validate({"cache": cache, "cache_folder": f"{name}/kept", "profile": STEPS})
            labels = {"trial": "traced", "study": None, "cell": {}}
            manifest = run_here(Job(run.model_dump(mode="json"), str(folder / "run"), labels, settings), quiet=True)
            tell(f"cache={cache}", json.loads((folder / "run" / "profile" / "trace.json").read_text())["traceEvents"])
            rows = [json.loads(line) for line in (folder / "run" / METRICS).read_text().splitlines()]
        for name in ("step_seconds", "data_wait"):
            values = sorted(row[name] for row in rows)
            low, middle, high = (values[round(share * (len(values) - 1))] for share in (0.1, 0.5, 0.9))
            print(f"  {name}: median {middle:.4g}, a tenth below {low:.4g}, a tenth above {high:.4g}")
        print(f"  {len(rows)} steps, {sum(row['step_seconds'] for row in rows):.1f} s; the run: {manifest['seconds']}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        of_run(Path(sys.argv[2]))
    else:
        main(asked_scale(__doc__))

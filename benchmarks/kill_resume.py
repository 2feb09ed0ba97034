"""A run killed with SIGKILL at random moments of both stages, checkpoints among them, against one left alone.

Every step writes a checkpoint, so that kills fall into writes too. Final weights must be the same to the bit, and the
log must hold each step once.

    python benchmarks/kill_resume.py [KILLS]
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from common import write_result
from safetensors.torch import load_file

STEPS = 400
RUN: dict[str, Any] = {
    "vision": {"encoders": [{"name": "clip", "shape": {"image_size": 32, "patch_size": 8, "width": 64, "depth": 2,
               "heads": 4, "mlp_width": 128}}], "image": {"resize": "squash"}, "adapter": "mlp"},
    "llm": {"name": "causal", "tokenizer": "bytes", "shape": {"width": 128, "depth": 2, "heads": 4, "kv_heads": 4,
            "mlp_width": 256, "context_length": 256}},
    "stages": [
        {"name": "pretrain", "data": {"name": "world", "task": "captions", "size": 64, "skills": ["colour"]},
         "train": ["fusion", "adapter", "tokens"], "lr": 1e-3, "batch_size": 4, "steps": STEPS},
        {"name": "finetune", "data": {"name": "world", "task": "dialogues", "size": 64, "skills": ["colour"]},
         "train": ["fusion", "adapter", "tokens", "llm"], "lr": 1e-3, "batch_size": 4, "steps": STEPS},
    ],
    "evaluate": {"name": "world", "size": 8, "skills": ["colour"]},
}  # fmt: skip


def start(run: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "chiasm.cli",
        "train",
        str(run),
        "--out",
        str(out),
        "--set",
        "checkpoint_seconds=0",
    ]
    return subprocess.Popen([*command, "--json"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=1200)
    if process.returncode:
        raise SystemExit(errors.decode()[-4000:])


def steps_done(out: Path) -> int:
    log = out / "metrics.jsonl"
    return len(log.read_bytes().splitlines()) if log.is_file() else 0


def kill_at(process: subprocess.Popen[bytes], out: Path, step: int, wait: float) -> int | None:
    """Kills a run a moment after a step; the steps in its log then, or None where it ended before."""
    while steps_done(out) < step:
        if process.poll() is not None:
            return None
        time.sleep(0.001)
    time.sleep(wait)
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return steps_done(out)


def weights(out: Path) -> dict[str, Any]:
    folder = out / "stages" / "finetune"
    return {
        f"{file.stem}.{name}": value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()
    }


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    draw = random.Random(0)
    # spread over both stages, and a little later each time than what the run has reached
    moments = sorted(draw.sample(range(1, 2 * STEPS), kills))
    with tempfile.TemporaryDirectory(prefix="chiasm-kill-") as folder:
        run = Path(folder) / "run.yaml"
        run.write_text(yaml.safe_dump(RUN))
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        finish(start(run, whole))
        reached, writes = [], 0
        for moment in moments:
            process = start(run, killed)
            found = kill_at(process, killed, moment, draw.random() * 0.02)
            if found is not None:
                reached.append(found)
                writes += any(killed.glob("stages/*/.checkpoint-*"))
        finish(start(run, killed))
        wanted, ended = weights(whole), weights(killed)
        same = set(wanted) == set(ended) and all(bool((wanted[name] == ended[name]).all()) for name in wanted)
        log = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
        order = [(line["stage"], line["step"]) for line in log]
        once = order == [(stage["name"], step + 1) for stage in RUN["stages"] for step in range(STEPS)]
        left = [str(path.relative_to(killed)) for path in killed.rglob("*checkpoint-*")]
    write_result(
        "kill_resume",
        figures={
            "kills": len(reached),
            "steps_done_at_each": reached,
            "in_stage_1": sum(step < STEPS for step in reached),
            "while_a_checkpoint_was_written": writes,
            "weights_equal_to_the_bit": same,
            "each_step_once_in_the_log": once,
            "checkpoints_left": left,
        },
        asked="20 kills with SIGKILL at random moments of both stages: the same weights to the bit, no step twice",
        met=len(reached) >= kills and same and once and not left,
    )


if __name__ == "__main__":
    main()

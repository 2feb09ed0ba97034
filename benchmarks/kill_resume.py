"""A run killed with SIGKILL at random moments of both stages, checkpoints among them, against one left alone.

Every step writes a checkpoint, so that kills fall into writes too. Final weights must be the same to the bit, and the
log must hold each step once. Then two runs that have stage 1 in common are killed in turn, each going on from where the
other was killed.

    python benchmarks/kill_resume.py [KILLS]
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from common import write_result
from safetensors.torch import load_file

from chiasm_experiments.training.shared import stage_folder

STEPS = 60
DRAW = random.Random(0)
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


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill: how many steps the log held after it, and whether a checkpoint was half written."""

    step: int
    writing: bool


def start(run: Path, out: Path, *settings: str) -> subprocess.Popen[bytes]:
    words = [str(run), "--out", str(out), "--set", "checkpoint_seconds=0", "--set", "cache=off", *settings]
    command = [sys.executable, "-m", "chiasm.cli", "train", *words, "--json"]
    # one thread: the model is tiny, and a sum over threads is a sum in another order
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


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
    process.communicate()
    return steps_done(out)


def kill_often(out: Path, store: Path, runs: list[Path], moments: list[int], settings: tuple[str, ...]) -> list[Kill]:
    """Kills runs in turn, each a moment after a step that it had not reached before."""
    kills: list[Kill] = []
    for turn, moment in enumerate(moments):
        run = runs[turn % len(runs)]
        folder = out / run.stem
        step = max(moment, kills[-1].step + 1 if kills else 1)
        found = kill_at(start(run, folder, *settings), folder, step, DRAW.random() * 0.02)
        if found is not None:
            writing = any(True for place in (folder, store) for _ in place.glob("**/.checkpoint-*"))
            kills.append(Kill(found, writing))
    for run in runs:
        finish(start(run, out / run.stem, *settings))
    return kills


def weights(out: Path) -> dict[str, Any]:
    """Of both stages."""
    found = {}
    for stage in RUN["stages"]:
        folder = stage_folder(out / "stages" / stage["name"])
        for file in folder.glob("*.safetensors"):
            found |= {f"{stage['name']}.{file.stem}.{name}": value for name, value in load_file(file).items()}
    return found


def same(wanted: dict[str, Any], found: dict[str, Any]) -> bool:
    return (
        len(wanted) > 0
        and set(wanted) == set(found)
        and all(bool((wanted[name] == found[name]).all()) for name in wanted)
    )


def logged_once(out: Path) -> bool:
    """Whether the log holds each step of each stage once and in order."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    order = [(line["stage"], line["step"]) for line in lines]
    return order == [(stage["name"], step + 1) for stage in RUN["stages"] for step in range(STEPS)]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def left(*folders: Path) -> list[str]:
    """What only a run at work should have: checkpoints, and files that are not written to their end."""
    found = [path for folder in folders for path in folder.rglob("*") if path.name.startswith((".", "checkpoint-"))]
    return sorted(path.name for path in found if path.suffix != ".lock")


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    moments = sorted(DRAW.sample(range(1, 2 * STEPS), count))
    common = sorted(DRAW.sample(range(1, STEPS), max(2, count // 5)))
    with tempfile.TemporaryDirectory(prefix="chiasm-kill-") as name:
        folder = Path(name)
        slow, fast = folder / "slow.yaml", folder / "fast.yaml"
        slow.write_text(yaml.safe_dump(RUN))
        fast.write_text(yaml.safe_dump(RUN | {"stages": [RUN["stages"][0], RUN["stages"][1] | {"lr": 3e-3}]}))
        whole, alone, shared, store = (folder / name for name in ("whole", "alone", "shared", "stages"))
        for run in (slow, fast):
            finish(start(run, whole / run.stem))
        kills = kill_often(alone, store, [slow], moments, ())
        # two runs that have stage 1 in common take it from each other's hands
        settings = ("--set", f"stages_folder={store}")
        handed = kill_often(shared, store, [slow, fast], common, settings)
        ended = [alone / "slow", shared / "slow", shared / "fast"]
        wanted = [weights(whole / out.name) for out in ended]
        equal = [same(weights(out), weights_) for out, weights_ in zip(ended, wanted, strict=True)]
        figures = {
            "kills": len(kills),
            "steps_done_at_each": [kill.step for kill in kills],
            "in_stage_1": sum(kill.step < STEPS for kill in kills),
            "while_a_checkpoint_was_written": sum(kill.writing for kill in kills),
            "kills_in_a_stage_that_two_runs_share": len(handed),
            "steps_done_at_each_of_them": [kill.step for kill in handed],
            "stage_1_trained_by_the_second_run_too": not shared_once(shared, store),
            "weights_of_both_stages_equal_to_the_bit": all(equal),
            "losses_equal_to_the_bit": all(losses(out) == losses(whole / out.name) for out in ended),
            "each_step_once_in_the_log": all(map(logged_once, ended)),
            "partial_files_left": left(alone, shared, store),
        }
    write_result(
        "kill_resume",
        figures=figures,
        asked="20 kills with SIGKILL at random moments of both stages, checkpoints among them: the same weights to the "
        "bit, no step twice",
        met=figures["kills"] >= count
        and 0 < figures["in_stage_1"] < count
        and figures["while_a_checkpoint_was_written"] > 0
        and figures["kills_in_a_stage_that_two_runs_share"] == len(common)
        and not figures["stage_1_trained_by_the_second_run_too"]
        and figures["weights_of_both_stages_equal_to_the_bit"]
        and figures["losses_equal_to_the_bit"]
        and figures["each_step_once_in_the_log"]
        and not figures["partial_files_left"],
    )


def shared_once(shared: Path, store: Path) -> bool:
    """Whether both runs refer to one result of stage 1."""
    places = {stage_folder(shared / name / "stages" / RUN["stages"][0]["name"]) for name in ("slow", "fast")}
    return len(places) == 1 and places <= set(store.iterdir())


if __name__ == "__main__":
    main()

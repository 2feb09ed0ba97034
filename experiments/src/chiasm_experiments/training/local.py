"""Runs in this process: what `chiasm train`, `chiasm evaluate` and `chiasm ask` do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from chiasm.sample import ImageFile, Sample, Turn
from chiasm_experiments.evaluation import Row, answer, evaluate, load_benchmarks, scores
from chiasm_experiments.training.precision import place
from chiasm_experiments.training.run import Job, execute, load_run_folder, make_feed
from chiasm_experiments.training.workers import Workers


def run_here(job: Job, *, quiet: bool = False) -> dict[str, Any]:
    """Executes a run through Ray Train's local mode, with a progress bar; its manifest."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    scaling = ScalingConfig(num_workers=0, use_gpu=torch.cuda.is_available())
    config = {"job": asdict(job), "quiet": quiet}
    manifest: dict[str, Any] = TorchTrainer(_loop, train_loop_config=config, scaling_config=scaling).fit().return_value
    return manifest


def evaluate_here(folder: Path) -> tuple[list[Row], dict[str, float]]:
    """The rows and scores of a finished run on its benchmarks, from its saved weights."""
    run, vlm = load_run_folder(folder)
    device = _device()
    place(vlm, run, device)
    rows = evaluate(vlm, run, make_feed(vlm, run), load_benchmarks(run.evaluate), Workers(0, 1, device))
    return rows, scores(rows)


def ask_here(folder: Path, image: Path, question: str, max_new_tokens: int) -> str:
    """A finished run's answer to a question about an image file."""
    source = ImageFile(image)
    source.load()  # an unreadable image is said before the model is loaded
    run, vlm = load_run_folder(folder)
    device = _device()
    place(vlm, run, device)
    sample = Sample(image.name, (Turn(question),), (source,))
    return answer(vlm, run, make_feed(vlm, run), [sample], device, max_new_tokens)[0]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _loop(config: dict[str, Any]) -> dict[str, Any]:
    bars: dict[str, tqdm[Any]] = {}

    def progress(what: str, step: int, steps: int, loss: float) -> None:
        if what not in bars:
            for bar in bars.values():
                bar.close()
            bars[what] = tqdm(total=steps, desc=what, unit="step", disable=config["quiet"] or None)
        bars[what].n = step
        bars[what].set_postfix_str("" if loss != loss else f"loss {loss:.3f}", refresh=True)

    try:
        return execute(Job(**config["job"]), progress)
    finally:
        for bar in bars.values():
            bar.close()

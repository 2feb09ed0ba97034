"""Runs in this process: what `chiasm train`, `chiasm evaluate` and `chiasm ask` do."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from tqdm import tqdm

from chiasm.plugin import hookimpl
from chiasm.registry import registry
from chiasm.sample import ImageFile, Sample, Turn
from chiasm_experiments.evaluation import Row, answer, evaluate, load_benchmarks, scores
from chiasm_experiments.training.guide import StoppedError, Unguided
from chiasm_experiments.training.overview import overview_text
from chiasm_experiments.training.precision import place
from chiasm_experiments.training.run import Job, execute, load_run_folder, make_feed
from chiasm_experiments.training.workers import Workers


def run_here(job: Job, *, quiet: bool = False) -> dict[str, Any]:
    """Executes a run through Ray Train's local mode, with a progress bar; its manifest.

    SIGINT and SIGTERM let it write a checkpoint first; a second one ends the process at once.

    Raises:
        SignalledError: a signal stopped the run; called again it goes on.
    """
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
    job = Job(**config["job"])
    with contextlib.ExitStack() as ends:
        asked = ends.enter_context(Signals(job.folder))
        bars = None
        if not config["quiet"]:
            plugins, table, bars = registry().plugins, _Table(), Bars()
            plugins.register(table)
            ends.callback(plugins.unregister, table)
            ends.callback(bars.close)
        try:
            return execute(job, Local(asked, bars))
        except StoppedError as stopped:
            assert asked.received is not None
            raise SignalledError(asked.received, str(stopped)) from None


class SignalledError(StoppedError):
    """A signal stopped a run."""

    def __init__(self, number: signal.Signals, where: str) -> None:
        super().__init__(f"{number.name}: {where}")
        self.number = number


class Signals:
    """A context in which the first SIGINT or SIGTERM is a polite request to stop, and the second one ends the process.

    Outside of the main thread, where Python allows no handler, signals do what they did.

    Args:
        folder: of the run, for the message.
        say: takes the message.
    """

    def __init__(self, folder: str, say: Callable[[str], None] | None = None) -> None:
        self.folder = folder
        self.say = say or (lambda line: tqdm.write(line, file=sys.stderr))
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _take(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            # the default is the end; a handler could wait for a lock that this very thread holds
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = signal.Signals(number)
        again = "; once more ends it at once" if number == signal.SIGINT else ""
        self.say(f"{self.received.name}: writing a checkpoint to {self.folder!r} after this step{again}")


class Local(Unguided):
    """The guide of a run in this process: a progress bar, and signals that stop it.

    Args:
        signals: that have come.
        bars: shown; None: none are.
    """

    def __init__(self, signals: Signals, bars: Bars | None = None) -> None:
        self.signals = signals
        self.bars = bars

    def progress(self, what: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar."""
        if self.bars is not None:
            self.bars(what, step, steps, metrics)

    def stopping(self) -> bool:
        """Whether a signal has come."""
        return self.signals.received is not None


class _Table:
    """Prints what each stage trains when the run begins."""

    @hookimpl
    def chiasm_run_started(self, manifest: Mapping[str, Any]) -> None:
        """Before the first bar."""
        tqdm.write(overview_text(manifest["training"]), file=sys.stderr)


class Bars:
    """A progress bar for each stage and the evaluation, one at a time; none where nobody looks at a terminal."""

    def __init__(self) -> None:
        self.what = ""
        self.bar: tqdm[Any] | None = None

    def __call__(self, what: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Takes what a `Guide` is told."""
        if self.bar is None or what != self.what:
            self.close()
            self.what = what
            # a stage that is taken up is not faster for the steps that an earlier process took
            self.bar = tqdm(total=steps, initial=max(0, step - 1), desc=what, unit="step", disable=None)
        self.bar.set_postfix_str(postfix(metrics), refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Ends the bar that is shown."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def postfix(metrics: Mapping[str, float]) -> str:
    """A step's metrics in a few words: `loss 2.310, 5.2k tok/s, MFU 41%, data 3%, 12.1 GiB`."""
    if not metrics:
        return ""
    rate = metrics["tokens_per_second"]
    words = [f"loss {metrics['loss']:.3f}", f"{rate / 1000:.1f}k tok/s" if rate >= 1000 else f"{rate:.0f} tok/s"]
    if "model_flop_utilisation" in metrics:
        words.append(f"MFU {metrics['model_flop_utilisation']:.0%}")
    return ", ".join([*words, f"data {metrics['data_wait']:.0%}", f"{metrics['peak_memory_bytes'] / 2**30:.1f} GiB"])

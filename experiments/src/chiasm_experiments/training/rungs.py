"""Rungs: moments of a run's last stage at which some questions are asked, so that a run that falls behind can end."""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from chiasm.config import RunConfig
from chiasm_experiments.data.feed import Feed
from chiasm_experiments.evaluation import evaluate, scores
from chiasm_experiments.interfaces import Benchmark, Question
from chiasm_experiments.training.checkpoint import Position
from chiasm_experiments.training.files import CURVE, read_json, write_json
from chiasm_experiments.training.guide import Guide, StoppedError
from chiasm_experiments.training.strategy import Strategy
from chiasm_experiments.training.workers import Workers


class PrunedError(Exception):
    """A run was judged at a rung and is not to go on."""

    def __init__(self, rung: int) -> None:
        super().__init__(f"pruned at rung {rung}")
        self.rung = rung


class Rungs:
    """The rungs of one run, and its learning curve as far as it is known.

    A rung changes nothing of what is learned: it draws no random number, and it keeps no feature where training would
    find it. One that stands in the curve is not asked again when a run is taken up, but it is reported again.

    Args:
        folder: of the run, with the curve.
        shares: of the last stage's steps, in (0, 1), rising.
        count: questions of each benchmark.
        run: the run.
        feed: makes batches; not training's own.
        benchmarks: those that are asked.
        workers: that train together, all of which ask.
        strategy: how they share the work.
        guide: judges.
    """

    def __init__(
        self,
        folder: Path,
        shares: Sequence[float],
        count: int,
        run: RunConfig,
        feed: Feed,
        benchmarks: Mapping[str, Benchmark],
        workers: Workers,
        strategy: Strategy,
        guide: Guide,
    ) -> None:
        self.file = folder / CURVE
        self.shares = shares
        self.run = run
        self.feed = feed
        self.benchmarks = benchmarks
        self.workers = workers
        self.strategy = strategy
        self.guide = guide
        self.questions = {name: spread(item.questions(), count) for name, item in benchmarks.items()}
        self.curve: list[dict[str, Any]] = []
        """Of each rung: its place, share and step, the seconds that the stage had trained, the scores of its questions,
        and the mean over benchmarks of their mean."""
        if workers.first and self.file.is_file():
            asked = sum(map(len, self.questions.values()))
            self.curve = [point for point in read_json(self.file) if len(point["scores"]) == asked]

    def steps(self, steps: int) -> dict[int, int]:
        """The step of each rung in a stage of so many; a rung that falls on the stage's end is none."""
        found = {rung: max(1, round(share * steps)) for rung, share in enumerate(self.shares)}
        return {rung: step for rung, step in found.items() if step < steps}

    def take_up(self, position: Position, steps: int) -> None:
        """Reports again what is known of the rungs up to the step from which a run goes on.

        Raises:
            PrunedError: the run is not to go on.
            StoppedError: the guide said so while questions of this very step were asked.
        """
        for rung, at in self.steps(steps).items():
            known = at <= position.step and self._known(rung, at)
            if at == position.step and not known:
                self._ask(rung, position)
            if known or at == position.step:
                self._report(rung)

    def reach(self, position: Position, steps: int) -> None:
        """Asks the questions of the rungs at a position and reports the scores; called on every worker.

        A guide that stops the run meanwhile gets no report: the rung is asked when the run is taken up.

        Raises:
            PrunedError: the run is not to go on.
        """
        with contextlib.suppress(StoppedError):
            for rung, at in self.steps(steps).items():
                if at == position.step:
                    if not self._known(rung, at):
                        self._ask(rung, position)
                    self._report(rung)

    def _known(self, rung: int, step: int) -> bool:
        """Whether the first worker's curve holds a rung as it is asked for."""
        wanted = (rung, self.shares[rung], step)
        found = any((point["rung"], point["share"], point["step"]) == wanted for point in self.curve)
        return bool(self.workers.sum(float(found)))

    def _ask(self, rung: int, position: Position) -> None:
        device, vlm = self.workers.device, self.feed.vlm
        training = vlm.training

        def answered(done: int, total: int) -> None:
            if self.workers.first:
                self.guide.progress(f"rung {rung}", done, total, {})
            if self.workers.sum(done < total and self.workers.first and self.guide.stopping()):
                raise StoppedError(f"stopped at rung {rung}")

        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), self.strategy.whole():
                rows = evaluate(
                    vlm,
                    self.run,
                    self.feed,
                    self.benchmarks,
                    self.workers,
                    questions=self.questions,
                    answered=answered,
                )
        finally:
            vlm.train(training)
        if self.workers.first:
            means = scores(rows).values()
            point = {
                "rung": rung,
                "share": self.shares[rung],
                "step": position.step,
                "seconds": position.seconds,
                "scores": [row["score"] for row in rows],
                "accuracy": sum(means) / len(means) if means else None,
            }
            others = [other for other in self.curve if other["rung"] != rung]
            self.curve = sorted([*others, point], key=lambda point: int(point["rung"]))
            write_json(self.file, self.curve)

    def _report(self, rung: int) -> None:
        on = False
        if self.workers.first:
            (point,) = (point for point in self.curve if point["rung"] == rung)
            on = self.guide.report(rung, point["share"], point["scores"])
        if not self.workers.sum(float(on)):
            raise PrunedError(rung)


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """Some of a benchmark's questions, in its order: of each skill its share, and the same ones in every run.

    They are drawn by a hash of their ids, since questions at even distances may all be of one kind.
    """
    skills: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for place, question in enumerate(questions):
        skills[question.skill].append((hashlib.sha256(question.id.encode()).hexdigest(), place))
    ranked = [
        ((rank + 0.5) / len(drawn), *item) for drawn in skills.values() for rank, item in enumerate(sorted(drawn))
    ]
    return [questions[place] for place in sorted(place for *_, place in sorted(ranked)[:count])]

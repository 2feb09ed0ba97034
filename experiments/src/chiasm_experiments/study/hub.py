"""What workers and the driver of a study tell each other while trials run.

Workers post and never wait, except at a rung for the driver's answer. If the driver dies so does the hub, which Ray
owns on its behalf; a worker that finds it gone takes that for a request to stop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

POST_SECONDS = 0.5
"""Between two posts of a worker, which also bring back whether it is to stop."""
LOOK_SECONDS = 0.05
POLL_SECONDS = 30.0
"""After which the driver's question for reports is answered even if there is none."""


@dataclass(frozen=True, slots=True)
class Report:
    """A trial that waits at a rung."""

    ticket: str
    rung: int
    share: float
    scores: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """The state of a trial as the hub knows it."""

    line: str
    quiet: float | None
    """Seconds since it showed progress; None while it waits for the driver, or has not begun."""
    seconds: float | None
    """Since it began; None: it has not."""
    processes: tuple[int, ...] = ()
    """Ids of its workers' processes, each on its own node."""


@dataclass(slots=True)
class _Trial:
    line: str = "waits for a place"
    begun: float | None = None
    shown: float = 0.0
    stop: bool = False
    rung: int | None = None
    answer: asyncio.Future[bool] | None = None
    workers: dict[int, Any] = field(default_factory=dict)
    processes: dict[int, int] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


@ray.remote(num_cpus=0)
class Hub:
    """One for each driver. A trial is known by its ticket, a new one each time that it starts."""

    def __init__(self) -> None:
        self.trials: dict[str, _Trial] = {}
        self.reports: list[Report] = []
        self.news = asyncio.Event()

    async def open(self, ticket: str) -> None:
        """A trial is about to start."""
        self.trials[ticket] = _Trial()

    async def close(self, ticket: str) -> None:
        """A trial has ended; what its worker may still post is forgotten."""
        self.trials.pop(ticket, None)
        self.reports = [report for report in self.reports if report.ticket != ticket]

    async def enter(self, ticket: str, rank: int, process: int, actor: Any = None) -> None:
        """A worker has begun with a trial."""
        if ticket in self.trials:
            trial = self.trials[ticket]
            trial.processes[rank] = process
            if actor is not None:
                trial.workers[rank] = actor
            trial.begun = trial.shown = time.monotonic()
            trial.line = "begins"

    async def post(self, ticket: str, line: str) -> bool:
        """Takes a trial's newest line; whether it is to stop."""
        trial = self.trials.get(ticket)
        if trial is None:
            return True
        trial.line, trial.shown = line, time.monotonic()
        return trial.stop

    async def ask(self, report: Report) -> bool:
        """Whether a trial goes on after a rung, once the driver has said so; a trial that is to stop is let go."""
        trial = self.trials.get(report.ticket)
        if trial is None or trial.stop:
            return True
        trial.rung, trial.answer = report.rung, asyncio.get_running_loop().create_future()
        self.reports.append(report)
        self.news.set()
        try:
            return await trial.answer
        finally:
            trial.rung, trial.answer, trial.shown = None, None, time.monotonic()

    async def answer(self, ticket: str, go_on: bool) -> None:
        """The driver's answer to the trial that waits."""
        trial = self.trials.get(ticket)
        if trial is not None and trial.answer is not None and not trial.answer.done():
            trial.answer.set_result(go_on)

    async def stop(self, tickets: Iterable[str]) -> None:
        """Asks trials to write a checkpoint and end; one that waits at a rung waits no longer."""
        for ticket in tickets:
            if ticket in self.trials:
                self.trials[ticket].stop = True
                await self.answer(ticket, True)

    async def fail(self, ticket: str, rank: int, error: str) -> None:
        """An error that a trial raised on one of its workers."""
        if ticket in self.trials:
            self.trials[ticket].errors[rank] = error

    async def errors(self, ticket: str) -> dict[int, str]:
        """The errors that a trial raised, by worker, in the order in which they came."""
        return self.trials[ticket].errors if ticket in self.trials else {}

    async def workers(self, ticket: str) -> list[Any]:
        """The actors that execute a trial."""
        return list(self.trials[ticket].workers.values()) if ticket in self.trials else []

    async def listen(self) -> list[Report]:
        """The reports that the driver has not heard of, as soon as there is one."""
        try:
            await asyncio.wait_for(self.news.wait(), POLL_SECONDS)
        except TimeoutError:
            return []
        self.news.clear()
        reports, self.reports = self.reports, []
        return reports

    async def look(self) -> dict[str, Seen]:
        """All trials."""
        now = time.monotonic()
        return {ticket: _seen(trial, now) for ticket, trial in self.trials.items()}


def _seen(trial: _Trial, now: float) -> Seen:
    if trial.begun is None:
        return Seen(trial.line, None, None)
    processes = tuple(process for _, process in sorted(trial.processes.items()))
    if trial.answer is not None:
        return Seen(f"waits at rung {trial.rung}", None, now - trial.begun, processes)
    return Seen(trial.line, now - trial.shown, now - trial.begun, processes)


class HubGuide:
    """The guide of a trial, on its first worker.

    Args:
        hub: of the trial's driver.
        ticket: of the trial.
    """

    def __init__(self, hub: Any, ticket: str) -> None:
        self.hub = hub
        self.ticket = ticket
        self._what = ""
        self._posted = self._looked = 0.0
        self._reply: Any = None
        self._stop = False

    def progress(self, what: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Posts it, now and then."""
        now = time.monotonic()
        if what != self._what or now - self._posted > POST_SECONDS:
            self._hear(wait=False)
            self._what, self._posted = what, now
            loss = f" loss {metrics['loss']:.3f}" if "loss" in metrics else ""
            self._reply = self.hub.post.remote(self.ticket, f"{what} {step}/{steps}{loss}")

    def stopping(self) -> bool:
        """What the hub said to the last post."""
        now = time.monotonic()
        if not self._stop and now - self._looked > LOOK_SECONDS:
            self._looked = now
            self._hear(wait=False)
        return self._stop

    def report(self, rung: int, share: float, scores: Sequence[float | None]) -> bool:
        """Waits for the driver's answer; where there is no driver any more the trial goes on, and stops."""
        try:
            on: bool = ray.get(self.hub.ask.remote(Report(self.ticket, rung, share, tuple(scores))))
            # a stop may have been what ended the wait
            self._reply = self.hub.post.remote(self.ticket, f"rung {rung}")
            self._hear(wait=True)
        except RayError:
            self._stop = on = True
        return on

    def _hear(self, *, wait: bool) -> None:
        if self._reply is None or not (wait or ray.wait([self._reply], timeout=0)[0]):
            return
        try:
            self._stop |= ray.get(self._reply)
        except RayError:
            self._stop = True
        self._reply = None

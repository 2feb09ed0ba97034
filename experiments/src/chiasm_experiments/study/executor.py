"""Where trials run: Ray actors that are reused for one-worker trials, `TorchTrainer` for several workers.

Both execute the same training function. An actor that has ended a one-worker trial keeps its frozen parts loaded, and
the next trial that wants the same ones goes there and begins at once.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import OutOfMemoryError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from chiasm.errors import ConfigError
from chiasm_experiments.study.hub import Hub, Report, Seen
from chiasm_experiments.study.keys import Key, Load
from chiasm_experiments.study.leftovers import Traces
from chiasm_experiments.study.places import Result, TrainerActor, TrialActor
from chiasm_experiments.study.settings import Resources
from chiasm_experiments.study.slots import count_slots, trials_per_gpu
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.run import Job

Say = Callable[[str], None]
LIMITS_SECONDS = 1.0
"""Between two looks at what shows no progress or takes too long."""
END_SECONDS = 15.0
"""In which a trial on several workers that are killed must have given back what it held."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A trial left its place.

    Args:
        trial: its name.
        status: `lost`: its worker died, and it may be started again. `stopped`: it was asked to, and is to be taken up.
        manifest: of one that is complete or pruned.
        error: traceback or reason of one that failed or was lost.
    """

    trial: str
    status: Literal["complete", "pruned", "stopped", "failed", "lost"]
    manifest: dict[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Reported:
    """A trial waits at a rung for an answer: `Pool.answer`."""

    trial: str
    rung: int
    share: float
    scores: tuple[float | None, ...]


@dataclass(slots=True)
class _Place:
    """An actor, what it holds and since when it is idle."""

    actor: Any
    share: float
    parts: str = ""
    used: int = 0


@dataclass(frozen=True, slots=True)
class _Running:
    ticket: str
    trial: str
    key: Key
    place: _Place
    reference: Any


class Pool:
    """As many trials at once as the cluster holds.

    Args:
        resources: what a trial takes.
        say: takes lines for the user.
        study: names actors and marks what this driver makes, so that later drivers of the study find what one that was
            killed has left.

    Raises:
        ConfigError: the cluster holds not even one trial.
    """

    def __init__(self, resources: Resources, say: Say = print, study: str = "") -> None:
        self.resources = resources
        self.say = say
        self.nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.gpus = _gpus(resources, self.nodes)
        self.shared = resources.gpus_per_worker == "auto" and resources.workers == 1 and bool(self.gpus)
        """Whether several trials may come to share a GPU."""
        self.fits: dict[Load, int] = {}
        """How many trials of a load share a GPU, once one of them was measured."""
        self._slots(1)
        self.traces = Traces(study)
        removed = self.traces.clear()
        if removed:
            say(f"removed what a driver of this study that was killed had left in the cluster: {', '.join(removed)}")
        # beside the driver, with which they end, and not where the cluster has most room
        self.here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self.hub = Hub.options(  # type: ignore[attr-defined]
            name=self.traces.hub, namespace=self.traces.namespace, scheduling_strategy=self.here
        ).remote()
        self.numbers = itertools.count(1)
        self.idle: list[_Place] = []
        self.running: dict[str, _Running] = {}
        """By trial."""
        self.queue: deque[tuple[Job, Key]] = deque()
        self.killed: dict[str, tuple[str, float]] = {}
        """By ticket the reason, and when."""
        self.seen: dict[str, Seen] = {}
        self.ready: list[Ended | Reported] = []
        self._news = self.hub.listen.remote()
        self._looked = 0.0

    @property
    def size(self) -> int:
        """Trials at once, with GPUs shared as measured so far."""
        return self._slots(max(self.fits.values(), default=1))

    @property
    def free(self) -> int:
        """Trials that could start now."""
        if self.queue:
            return 0
        most = max(self.fits.values(), default=1)
        free = self._slots(most) - len(self.running)
        if self.shared:
            left = sum(node.get("GPU", 0) for node in self.nodes) - sum(r.place.share for r in self.running.values())
            free = min(free, int(left * most + 1e-3))
        return max(0, free)

    @property
    def execution(self) -> Execution:
        """How each trial is executed, with loader processes as its share of the machine allows."""
        execution = self.resources.execution
        if execution.loader_workers != "auto":
            return execution
        loaders = max(1, min(8, int(self.resources.cpus_per_worker) - 1)) if self.gpus else 0
        return execution.model_copy(update={"loader_workers": loaders})

    def warm(self) -> frozenset[str]:
        """The parts that idle actors hold."""
        return frozenset(place.parts for place in self.idle if place.parts)

    def submit(self, job: Job, key: Key) -> None:
        """Starts a trial where its frozen parts are loaded already, else anywhere; it waits if there is no room.

        Args:
            job: the trial; its label `trial` names it.
            key: what it has in common with others.
        """
        self.queue.append((job, key))
        self._start()

    def events(self, seconds: float) -> list[Ended | Reported]:
        """What has happened, as soon as anything has; nothing after some seconds."""
        until = time.monotonic() + seconds
        while not self.ready:
            left = until - time.monotonic()
            waited = [self._news, *(item.reference for item in self.running.values())]
            done, _ = ray.wait(waited, num_returns=1, timeout=max(0.0, min(left, LIMITS_SECONDS)))
            self._listen(done)
            for item in [item for item in self.running.values() if item.reference in done]:
                self._end(item)
            self._start()
            if time.monotonic() - self._looked > LIMITS_SECONDS:
                self._limit()
            if left <= 0:
                break
        events, self.ready = self.ready, []
        return events

    def answer(self, trial: str, go_on: bool) -> None:
        """Lets a trial that waits at a rung go on, or prunes it."""
        if trial in self.running:
            self.hub.answer.remote(self.running[trial].ticket, go_on)

    def stop(self, trials: Iterable[str] | None = None) -> None:
        """Asks trials, or all, to write a checkpoint and end; those that have not started end at once."""
        names = set(self.running) | {job.labels["trial"] for job, _ in self.queue} if trials is None else set(trials)
        for entry in [entry for entry in self.queue if entry[0].labels["trial"] in names]:
            self.queue.remove(entry)
            self.ready.append(Ended(entry[0].labels["trial"], "stopped"))
        begun = [item for name, item in self.running.items() if name in names]
        ray.get(self.hub.stop.remote([item.ticket for item in begun]))

    def kill(self, trial: str, reason: str) -> None:
        """Ends a trial at once; it comes back as failed."""
        for entry in [entry for entry in self.queue if entry[0].labels["trial"] == trial]:
            self.queue.remove(entry)
            self.ready.append(Ended(trial, "failed", error=reason))
        item = self.running.get(trial)
        if item is None or item.ticket in self.killed:
            return
        self.killed[item.ticket] = (reason, time.monotonic())
        if self.resources.workers == 1:
            ray.kill(item.place.actor)
        else:  # Ray Train then gives back what it holds for them
            for actor in ray.get(self.hub.workers.remote(item.ticket)):
                ray.kill(actor)

    def takes(self, key: Key) -> float:
        """GPUs that a trial of a key takes now, or CPUs where it takes no GPU."""
        gpus = _share(self._fitting(key.load) or 1) if self.shared else self.gpus
        return self.resources.workers * (gpus or self.resources.cpus_per_worker)

    def rest(self) -> None:
        """Ends idle actors, so that another driver's trials find room."""
        for place in self.idle:
            ray.kill(place.actor)
        self.idle.clear()

    def progress(self) -> dict[str, str]:
        """The newest line of each trial that was submitted and has not ended."""
        lines = {job.labels["trial"]: "waits for a place" for job, _ in self.queue}
        for name, item in self.running.items():
            lines[name] = self.seen[item.ticket].line if item.ticket in self.seen else "starts"
        return lines

    def close(self) -> None:
        """Ends everything at once; `stop` and `events` first, where trials are to be taken up later."""
        self.queue.clear()
        with contextlib.suppress(RayError):
            if self.resources.workers > 1 and self.running:
                for name in self.running:
                    self.kill(name, "the study was ended")
                ray.wait(
                    [r.reference for r in self.running.values()], num_returns=len(self.running), timeout=END_SECONDS
                )
        for place in [*self.idle, *(item.place for item in self.running.values())]:
            ray.kill(place.actor)
        ray.kill(self.hub)
        self.idle.clear()
        self.running.clear()
        self.traces.forget()

    def _slots(self, per_gpu: int) -> int:
        """Trials at once if so many share a GPU.

        Raises:
            ConfigError: not even one fits, which would wait for ever.
        """
        resources = self.resources
        gpus = _share(per_gpu) if self.shared else self.gpus
        fits = count_slots(self.nodes, resources.cpus_per_worker, gpus, resources.workers)
        if fits < 1:
            have = [{name: node.get(name, 0) for name in ("CPU", "GPU")} for node in self.nodes]
            raise ConfigError(
                f"resources: a trial takes {resources.workers} x {{CPU: {resources.cpus_per_worker:g}, GPU: "
                f"{self.gpus:g}}}, and the nodes of the cluster have {have}; lower workers or what each takes"
            )
        return fits if resources.concurrent == "auto" else min(fits, resources.concurrent)

    def _fitting(self, load: Load) -> int | None:
        """How many trials of a load share a GPU: as many as of a measured one that does no less; None: not known."""
        return max((count for known, count in self.fits.items() if known.covers(load)), default=None)

    def _start(self) -> None:
        """Starts what waits, in order, as far as there is room."""
        while self.queue:
            job, key = self.queue[0]
            share = _share(self._fitting(key.load) or 1) if self.shared else self.gpus
            place = self._place(key.parts, share)
            if place is None:
                return
            self.queue.popleft()
            place.parts = key.parts
            trial, ticket = job.labels["trial"], f"{job.labels['trial']}#{next(self.numbers)}"
            ray.get(self.hub.open.remote(ticket))
            reference = place.actor.run.remote(job, self.hub, ticket)
            self.running[trial] = _Running(ticket, trial, key, place, reference)

    def _place(self, parts: str, share: float) -> _Place | None:
        """The actor for a trial: one that holds what it needs, the one that was idle for longest, or a new one."""
        most = round(1 / share) if self.shared else 1
        if len(self.running) >= self._slots(most):
            return None
        if self.shared:
            total = sum(node.get("GPU", 0) for node in self.nodes) + 1e-6
            if sum(item.place.share for item in self.running.values()) + share > total:
                return None
        fitting = [place for place in self.idle if place.share == share]
        found = [place for place in fitting if place.parts == parts] or fitting
        if found:
            place = min(found, key=lambda place: place.used)
            self.idle.remove(place)
            return place
        held = sum(place.share for place in self.idle) + sum(item.place.share for item in self.running.values())
        while self.shared and self.idle and held + share > total:
            oldest = min(self.idle, key=lambda place: place.used)
            self.idle.remove(oldest)
            ray.kill(oldest.actor)
            held -= oldest.share
        return _Place(self._new(share), share)

    def _new(self, share: float) -> Any:
        named = {"name": f"{self.traces.name}/{next(self.numbers)}", "namespace": self.traces.namespace}
        if self.resources.workers > 1:
            options = TrainerActor.options(scheduling_strategy=self.here, **named)  # type: ignore[attr-defined]
            return options.remote(self.resources, share)
        cpus = self.resources.cpus_per_worker
        options = TrialActor.options(num_cpus=cpus, num_gpus=share, **named)  # type: ignore[attr-defined]
        return options.remote(max(1, int(cpus)), share if self.shared and share < 1 else None)

    def _listen(self, done: list[Any]) -> None:
        """Takes the reports of trials that wait."""
        if self._news not in done:
            return
        reports: list[Report] = ray.get(self._news)
        self._news = self.hub.listen.remote()
        trials = {item.ticket: item.trial for item in self.running.values()}
        self.ready += [
            Reported(trials[report.ticket], report.rung, report.share, report.scores)
            for report in reports
            if report.ticket in trials
        ]

    def _end(self, item: _Running) -> None:
        """A trial has left its actor, or its actor has died."""
        del self.running[item.trial]
        reason, _ = self.killed.pop(item.ticket, (None, 0.0))
        try:
            result: Result = ray.get(item.reference)
        except RayError as error:
            ray.kill(item.place.actor)
            result = Result("lost", error=_why(error))
        else:
            item.place.used = next(self.numbers)
            if result.reusable:
                self.idle.append(item.place)
            else:
                ray.kill(item.place.actor)
        self.hub.close.remote(item.ticket)
        if reason is not None:
            self.ready.append(Ended(item.trial, "failed", error=reason))
            return
        if self.shared and self._fitting(item.key.load) is None and result.manifest is not None:
            self._measured(item, result)
        self.ready.append(Ended(item.trial, result.status, result.manifest, result.error))

    def _measured(self, item: _Running, result: Result) -> None:
        """Settles how many trials like one that had a whole GPU share one."""
        assert result.manifest is not None
        busy, peak = result.manifest["gpu_busy"], result.manifest["peak_gpu_bytes"]
        count = trials_per_gpu(busy, peak, result.gpu_bytes, self.resources.trials_per_gpu)
        self.fits[item.key.load] = count
        if count > 1:
            self.say(
                f"{item.trial} kept its GPU busy for {busy:.0%} of the time: {count} of its kind share one from now on"
            )

    def _limit(self) -> None:
        """Ends trials that show no progress or take too long."""
        self._looked = now = time.monotonic()
        self.seen = ray.get(self.hub.look.remote())
        stall, longest = self.resources.stall_seconds, self.resources.trial_seconds
        for item in list(self.running.values()):
            seen = self.seen.get(item.ticket)
            _, since = self.killed.get(item.ticket, ("", now))
            if now - since > END_SECONDS:
                ray.kill(item.place.actor)
            elif seen is None:
                continue
            elif longest is not None and seen.seconds is not None and seen.seconds > longest:
                self.kill(item.trial, f"took longer than trial_seconds ({longest:g}); its last sign was: {seen.line}")
            elif seen.quiet is not None and seen.quiet > stall:
                self.kill(
                    item.trial, f"showed no progress for stall_seconds ({stall:g}); its last sign was: {seen.line}"
                )


def _gpus(resources: Resources, nodes: list[dict[str, float]]) -> float:
    if resources.gpus_per_worker == "auto":
        return 1 if any(node.get("GPU") for node in nodes) else 0
    return resources.gpus_per_worker


def _share(count: int) -> float:
    """The share of a GPU of which so many fit into one, in the steps in which Ray counts."""
    return int(1e4 / count) / 1e4


def _why(error: RayError) -> str:
    """What Ray knows of a worker's death, in a line."""
    if isinstance(error, OutOfMemoryError):
        return f"its worker was ended because the node ran out of memory: {' '.join(str(error).split())[:600]}"
    lines = [line.strip() for line in str(error).splitlines()]
    about = dict(line.split(": ", 1) for line in lines if line.startswith(("pid: ", "ip: ")))
    reason = next((line for line in lines if line.startswith("The actor is dead")), lines[0] if lines else "")
    if "connection error" in reason:
        reason = "killed by a signal (SIGKILL, by the kernel where memory ran out; SIGSEGV where native code crashed)"
    where = f"process {about.get('pid', 'unknown')} on {about.get('ip', 'a node that Ray does not name')}"
    return f"its worker died, {where}: {reason}; what it said last stands in Ray's logs under that number"

"""Who is told what a run does: TensorBoard, MLflow, W&B, and every plugin that implements the hooks.

A listener may fail; the run goes on. The first error of one is printed, and it is told no more of that run.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from chiasm.errors import ConfigError
from chiasm.registry import registry
from chiasm_experiments.training.guide import StoppedError

LOGGERS = {
    "tensorboard": "chiasm_experiments.loggers.tensorboard:TensorBoard",
    "mlflow": "chiasm_experiments.loggers.mlflow:MLflow",
    "wandb": "chiasm_experiments.loggers.wandb:WandB",
}
"""The loggers that come with chiasm-experiments. A class among them takes no argument and implements hooks."""

ASKED_BY = {"mlflow": "MLFLOW_TRACKING_URI", "wandb": "WANDB_PROJECT"}
"""Environment variables that a user of these sets anyway."""


def chosen(loggers: Literal["auto"] | Sequence[str]) -> list[str]:
    """The loggers of a run; auto: TensorBoard, and those whose environment variable is set."""
    if loggers == "auto":
        return ["tensorboard", *(name for name, variable in ASKED_BY.items() if os.environ.get(variable))]
    return list(loggers)


class Listeners:
    """Tells the loggers of one run, and the plugins, through the hooks.

    A context: where an error leaves it, the run has ended as failed or stopped; its end unregisters the loggers.

    Args:
        loggers: names of loggers; their packages are imported now.
        asked: whether the user named them: then one that cannot be imported is an error.
        say: takes a line about a listener that failed.

    Raises:
        ConfigError: a named logger's package is not installed.
    """

    def __init__(self, loggers: Sequence[str], *, asked: bool, say: Callable[[str], None] | None = None) -> None:
        self.say = say or (lambda line: print(line, file=sys.stderr))
        self.manager = registry().plugins
        self._own: list[object] = []
        self._silenced: list[object] = []
        self._begun: dict[str, Any] | None = None
        for name in loggers:
            try:
                plugin = _load(name)
            except ImportError as error:
                told = f'the logger {name} needs a package: pip install "chiasm-experiments[{name}]" ({error})'
                if asked:
                    self.close()
                    raise ConfigError(told) from error
                self.say(f"{told}; the run goes on without it")
            else:
                self.manager.register(plugin, name=f"chiasm-experiments:{name}:{id(plugin)}")
                self._own.append(plugin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._begun is not None:
            status = "stopped" if isinstance(error, StoppedError) else "failed"
            ended = {**self._begun["manifest"], "status": status, "error": f"{type(error).__name__}: {error}"}
            self.tell("chiasm_run_ended", folder=self._begun["folder"], manifest=ended)
        self.close()

    def close(self) -> None:
        """Unregisters the loggers."""
        while self._own:
            self.manager.unregister(self._own.pop())

    def tell(self, hook: str, **values: Any) -> None:
        """Calls a hook on everyone that implements it, each on its own."""
        if hook == "chiasm_run_started":
            self._begun = values
        elif hook == "chiasm_run_ended":
            self._begun = None
        plugins = [item.plugin for item in getattr(self.manager.hook, hook).get_hookimpls()]
        for plugin in plugins:
            if any(plugin is silent for silent in self._silenced):
                continue
            others = [other for other in self.manager.get_plugins() if other is not plugin]
            try:
                self.manager.subset_hook_caller(hook, others)(**values)
            except Exception as error:  # whatever a listener raises must not stop the run
                self._silenced.append(plugin)
                name = self.manager.get_name(plugin) or repr(plugin)
                name = name.rpartition(":")[0] if plugin in self._own else name
                self.say(f"{name} failed in {hook} and is told no more: {type(error).__name__}: {error}")


def _load(name: str) -> object:
    module, _, attribute = LOGGERS[name].partition(":")
    logger: object = getattr(importlib.import_module(module), attribute)()
    return logger

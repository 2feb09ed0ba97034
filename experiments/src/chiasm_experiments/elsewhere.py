"""What a data set or a benchmark gives in another process, for its contract; light, as it is imported there too."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chiasm.sample import Sample
    from chiasm.settings import Settings
    from chiasm_experiments.interfaces import Question

UNREADABLE = 3
"""Exit status where the class cannot be imported in a process of its own."""


def sample_facts(sample: Sample) -> tuple[Any, ...]:
    """What is equal for equal samples."""
    return sample.id, sample.turns, sample.system, [image.key for image in sample.images]


def question_facts(question: Question) -> tuple[Any, ...]:
    """What is equal for equal questions."""
    keys = [image.key for image in question.images]
    return (
        question.id,
        question.text,
        question.references,
        keys,
        question.cluster,
        question.skill,
        question.chance,
        question.metadata,
    )


def facts_elsewhere(cls: type, config: Settings) -> tuple[list[str], str] | None:
    """The facts, written out, and the identity that a process with another seed of `hash()` finds.

    None: the class cannot be imported there, as one that a function defines.
    """
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if "<locals>" in cls.__qualname__ or file is None:
        return None
    job = {"path": sys.path, "module": cls.__module__, "file": file, "name": cls.__qualname__}
    job |= {"config": config.model_dump_json()}
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import main; main()"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONHASHSEED": "4711", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode == UNREADABLE:
        return None
    if done.returncode:
        return [f"an error: {done.stderr.strip().rpartition(chr(10))[2]}"], ""
    facts, identity = json.loads(done.stdout.rpartition("\n")[2])
    return facts, identity


def main() -> None:
    """Reads a job from standard input, and writes the facts as the last line of standard output."""
    job = json.load(sys.stdin)
    try:
        made = _make(job)
    except Exception:
        sys.exit(UNREADABLE)
    if hasattr(made, "questions"):
        found: tuple[list[str], str] = [repr(question_facts(item)) for item in made.questions()], ""
    else:
        found = [repr(sample_facts(made[i])) for i in range(min(64, len(made)))], made.identity()
    sys.stdout.write("\n" + json.dumps(found))


def _make(job: dict[str, Any]) -> Any:
    try:
        module = importlib.import_module(job["module"])
        assert getattr(module, "__file__", None) == job["file"]
    except (ImportError, AssertionError):  # a file that is run or tested, and is in no package
        spec = importlib.util.spec_from_file_location(job["module"], Path(job["file"]))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[job["module"]] = module
        spec.loader.exec_module(module)
    cls: Any = module
    for name in job["name"].split("."):
        cls = getattr(cls, name)
    return cls(cls.Config.model_validate_json(job["config"]))

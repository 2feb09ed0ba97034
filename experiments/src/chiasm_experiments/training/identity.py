"""What the result of a stage depends on, as a key: equal keys are equal results, to rounding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from chiasm.config import ComponentRef, Part, RunConfig
from chiasm_experiments.data.mixture import Mixture

NOT_RESULTS = {"micro_batch_size"}
"""Fields of a stage that move its result by rounding alone."""


def stage_key(
    run: RunConfig,
    index: int,
    mixtures: Sequence[Mixture],
    dtype: torch.dtype,
    environment: dict[str, Any],
    random_parts: Sequence[Part] = (),
) -> str:
    """The key of a run's parts after stage `index`.

    It holds the model, where its weights come from, the stages so far, their data, the seed, the number format and
    the versions of the code; and nothing of later stages or of the evaluation. How many workers shared a step, and in
    which format a part is held that only a later stage trains, move a result by rounding alone and are left out.

    Args:
        run: the run.
        index: of the stage.
        mixtures: the data of each stage.
        dtype: of computation.
        environment: what `environment.describe` tells.
        random_parts: parts that start from no checkpoint, so that the stage's files hold them.
    """
    refs = [*run.vision.encoders, run.vision.fusion, run.vision.adapter, run.llm]
    known = {
        "vision": run.vision.model_dump(mode="json"),
        "llm": run.llm.model_dump(mode="json"),
        "tokens": run.tokens.model_dump(mode="json"),
        "system": run.system,
        "sources": [dict(_sources(ref)) for ref in refs],
        "stages": [stage.model_dump(mode="json", exclude=NOT_RESULTS) for stage in run.stages[: index + 1]],
        "data": [[dataset.identity() for dataset in mixture.datasets] for mixture in mixtures[: index + 1]],
        "seed": run.seed,
        "dtype": str(dtype),
        # in bfloat16 the files of a part that nothing trains would be too coarse for a run that trains it later
        "held": [] if dtype == torch.float32 else sorted(set(random_parts) & set(run.trained)),
        "versions": {name: environment[name] for name in ("packages", "plugins", "git_revision")},
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def _sources(ref: ComponentRef) -> Iterator[tuple[str, Any]]:
    """What stands behind each option of a component that names weights or a tokenizer."""
    for name, value in ref.options.items():
        if isinstance(value, str) and (found := _source(value)) is not None:
            yield name, found


def _source(value: str) -> Any:
    """A folder's files by size and time of change, or the commit of a hub id; None for any other text."""
    path = Path(value)
    if path.is_absolute() and path.exists():
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        stats = [(file, file.stat()) for file in files]
        return [[file.relative_to(path).as_posix(), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    reference = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=value, repo_type="model") / "refs" / "main"
    try:
        return reference.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None

"""What each stage trains and what it keeps frozen, as it stands when a run begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from chiasm.config import RunConfig
from chiasm.vlm import VLM
from chiasm_experiments.training.precision import compute_dtype


def overview(vlm: VLM, run: RunConfig, device: torch.device) -> list[dict[str, Any]]:
    """A row for each part of each stage, as plain values; leaves the model as `set_trained(run.trained)` does."""
    rows = []
    for stage in run.stages:
        vlm.set_trained(stage.train)
        for count in vlm.counts():
            formats = sorted({_name(p.dtype) for p in vlm.part(count.part).parameters()})
            rows.append(
                {
                    "stage": stage.name,
                    "part": count.part,
                    "trained": count.trained,
                    "frozen": count.frozen,
                    "lr": stage.rate(count.part) if count.part in stage.train else None,
                    "optimizer": stage.optimizer if count.part in stage.train else None,
                    "held_in": formats,
                    "computed_in": _name(compute_dtype(run, device)),
                }
            )
    vlm.set_trained(run.trained)
    return rows


def overview_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table to read; parts without parameters are left out."""
    head = ("stage", "part", "trained", "frozen", "learning rate", "held in", "computed in")
    cells = [head]
    for row in rows:
        if row["trained"] + row["frozen"]:
            rate = "" if row["lr"] is None else f"{row['lr']:g} ({row['optimizer']})"
            numbers = (f"{row['trained']:,}", f"{row['frozen']:,}")
            cells.append((row["stage"], row["part"], *numbers, rate, ", ".join(row["held_in"]), row["computed_in"]))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    right = {2, 3}
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

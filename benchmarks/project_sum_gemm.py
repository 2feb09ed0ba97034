"""The time of `project_sum` over all layers of one encoder, beside the plain matrix product of the same size.

CLIP ViT-L/14-336's 24 layers to a language model of width 4096, batch 16. Inference: features and parameters in
bfloat16, no gradient. Training: features in bfloat16 without a gradient, as a frozen encoder gives them, parameters in
float32 under autocast, forward and forward with backward. The plain product is `nn.Linear(24 * 1024, 4096, bias=False)`
on features that already lie side by side, treated alike. Both alternate; times are medians.

    python benchmarks/project_sum_gemm.py            on a GPU; writes the result
    python benchmarks/project_sum_gemm.py --small    anywhere, at a small size; prints only
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from common import write_result
from torch import Tensor, nn

from chiasm.features import Features, FeatureSpec
from chiasm_adapters.project_sum import ProjectSum, ProjectSumConfig

BAR = 1.3
ASKED = f"forward, and forward with backward, each at most {BAR} times the plain product of the same size"


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one run."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1000
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def medians(runs: dict[str, Callable[[], Any]], repetitions: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Median, least and most milliseconds of each, all run in turn in every repetition."""
    for _ in range(5):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            times[name].append(timed(run, device))
    return {
        name: {"median_ms": statistics.median(found), "min_ms": min(found), "max_ms": max(found)}
        for name, found in times.items()
    }


def forward(module: nn.Module, given: Any, autocast: bool, device: torch.device) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
        out = module(given)
    tokens: Tensor = out if isinstance(out, Tensor) else out.tokens
    return tokens


def measure(batch: int, spec: FeatureSpec, width: int, repetitions: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    # without the activation: the plain product has none either
    ours = ProjectSum(ProjectSumConfig(width=width, activation="none"), [spec], width).to(device)
    plain = nn.Linear(spec.layers * spec.width, width, bias=False, device=device)
    shape = (batch, spec.layers, spec.tokens, spec.width)
    features = [Features(torch.randn(shape, device=device, dtype=torch.bfloat16), spec.grid)]
    side_by_side = features[0].tokens.transpose(1, 2).reshape(batch * spec.tokens, -1)
    grad_BNE = torch.randn(batch, spec.tokens, width, device=device, dtype=torch.bfloat16)
    both: dict[str, tuple[nn.Module, Any, Tensor]] = {
        "project_sum": (ours, features, grad_BNE),
        "plain": (plain, side_by_side, grad_BNE.flatten(0, 1)),
    }

    def both_ways(module: nn.Module, given: Any, grad: Tensor) -> None:
        module.zero_grad(set_to_none=True)
        torch.autograd.backward(forward(module, given, True, device), grad)

    training = {
        name: (lambda item=item: forward(item[0], item[1], True, device))  # type: ignore[misc]
        for name, item in both.items()
    }
    steps = {name: (lambda item=item: both_ways(*item)) for name, item in both.items()}  # type: ignore[misc]
    figures = {
        "training forward": medians(training, repetitions, device),
        "training forward and backward": medians(steps, repetitions, device),
    }
    for module, *_ in both.values():
        module.zero_grad(set_to_none=True)
        module.to(torch.bfloat16)
    with torch.inference_mode():
        inference = {
            name: (lambda item=item: forward(item[0], item[1], False, device))  # type: ignore[misc]
            for name, item in both.items()
        }
        figures["inference forward"] = medians(inference, repetitions, device)
    for cell in figures.values():
        cell["ratio"] = cell["project_sum"]["median_ms"] / cell["plain"]["median_ms"]  # type: ignore[assignment]
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small size, on the CPU if need be; writes no result")
    parser.add_argument("--repetitions", type=int, default=50)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.small:
        found = measure(2, FeatureSpec(layers=4, grid=(4, 4), width=64), 128, 3, device)
        for what, cell in found.items():
            print(f"{what}: {cell['ratio']:.2f}")
    else:
        if device.type != "cuda":
            parser.error("the full size needs a GPU; try --small")
        batch, spec, width = 16, FeatureSpec(layers=24, grid=(24, 24), width=1024), 4096
        found = measure(batch, spec, width, arguments.repetitions, device)
        worst = max(cell["ratio"] for cell in found.values())
        size = f"[{batch * spec.tokens}, {spec.layers * spec.width}] x [{spec.layers * spec.width}, {width}]"
        write_result(
            "project_sum_gemm",
            figures={"size": size, "repetitions": arguments.repetitions, **found},
            asked=ASKED,
            met=worst <= BAR,
            ratio=worst,
        )

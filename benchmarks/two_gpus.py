"""On two GPUs: the same result, in less time.

Training: CLIP-L/14-336, an MLP and Mistral-7B with LoRA (random weights at real shapes), stage 1 (connectors) and then
stage 2 (connectors and LoRA) from JPEGs on the disk, on one GPU, and on two with DDP and with FSDP2 through Ray Train:
samples/s, peak memory of each GPU, and the first losses with the same global batch. Then stage 2 in full, which one
GPU of 80 GB cannot hold, in shards on two.

Studies, on a cluster of one GPU and on one of two: trials at half a GPU each; trials on both GPUs, one of whose workers
is killed; and two studies at once, of halves and of a whole GPU.

What takes one GPU, training and the study, runs at the same time, each with a GPU and half of the cores of its own.

    python benchmarks/two_gpus.py [--tiny] [PART ...]

A part that is named runs again, and what an earlier command found of the others stays. `--tiny` takes models of a few
hundred weights and gloo on the CPU, to see that it works; it writes no result.

Shape letters: none.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from common import RESULTS, write_result
from two_gpus_plan import LARGE, SMALL, Plan, hold_half
from two_gpus_studies import ON_ONE, STUDIES, check_studies, judge_studies, studies
from two_gpus_training import DDP, FSDP, ONE, STRATEGIES, WHOLE, judge_training, training

FILE = RESULTS / "two_gpus.json"
OF_ONE = (ONE, ON_ONE)
PARTS = (*OF_ONE, DDP, FSDP, *(name for name in STUDIES if name != ON_ONE), WHOLE)


def measure(plan: Plan, name: str, half: int | None = None) -> dict[str, Any]:
    """What a part found.

    Args:
        plan: how large it is.
        name: of the part.
        half: of the machine, that it is to keep to.
    """
    if half is not None:
        hold_half(half)
    found = training(plan, name) if name in STRATEGIES else studies(plan, name)
    print(name, json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU, with gloo; writes no result")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of: {'; '.join(PARTS)} (all)")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are: {'; '.join(PARTS)}")
    plan = SMALL if asked.tiny else LARGE
    if plan.gpus and torch.cuda.device_count() < 2:
        raise SystemExit(f"there are {torch.cuda.device_count()} GPUs; give --tiny to see whether it works")
    wanted = [name for name in PARTS if name in asked.parts or not asked.parts]
    check_studies(plan, [name for name in wanted if name in STUDIES])
    figures: dict[str, Any] = json.loads(FILE.read_text())["figures"] if asked.parts and FILE.is_file() else {}
    small = [name for name in OF_ONE if name in wanted]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        running = {name: pool.submit(measure, plan, name, half) for half, name in enumerate(small)}
        figures |= {name: future.result() for name, future in running.items()}
    write(figures, plan)
    for name in wanted:
        if name not in OF_ONE:
            figures[name] = measure(plan, name)
            write(figures, plan)


def write(figures: dict[str, Any], plan: Plan) -> None:
    """What was found so far."""
    told, studied = judge_training(figures), judge_studies(figures)
    figures |= {"two to one in training": told, "two to one in studies": studied}
    met = (
        len(told) == 2
        and bool(studied)
        and max(item["speed"]["pretrain"] for item in told.values()) >= 1.9
        and max(item["speed"]["finetune"] for item in told.values()) >= 1.8
        and all(max(item["loss_difference"].values()) <= 2**-7 for item in told.values())
        and studied["throughput"] >= 1.9
        and all(value for name, value in studied.items() if name != "throughput")
    )
    write_result(
        FILE.stem,
        figures=figures,
        ratio=max((item["speed"]["pretrain"] for item in told.values()), default=None),
        asked="samples/s 1.9 times one GPU's in stage 1 and 1.8 in stage 2; the first 20 losses equal within the "
        "rounding of bfloat16 (2^-7); studies of halves, of both GPUs with a worker killed, and mixed all complete, "
        "placed as asked, no GPU idle while trials wait, with 1.9 times one GPU's trials an hour",
        met=met,
        write=bool(plan.gpus),
    )


if __name__ == "__main__":
    main()

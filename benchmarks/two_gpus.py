"""On two GPUs: the same result, in less time.

Training: CLIP-L/14-336, an MLP and Mistral-7B with LoRA (random weights at real shapes), stage 1 (connectors) and then
stage 2 (connectors and LoRA) from JPEGs on the disk, on one GPU, and on two with DDP and with FSDP2 through Ray Train:
samples/s, peak memory of each GPU, and the first losses with the same global batch. Then stage 2 in full, which one
GPU of 80 GB cannot hold, in shards on two.

Studies, on a cluster of one GPU and on one of two: trials at half a GPU each; a trial on both GPUs one of whose workers
is killed, beside the next trial of its study; and two studies at once, of halves and of a whole GPU.

    python benchmarks/two_gpus.py [--tiny] [--part training|studies|full]

`--tiny` takes models of a few hundred weights and gloo on the CPU, to see that it works; it writes no result.

Shape letters: none.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from common import RESULTS, write_result
from two_gpus_plan import LARGE, SMALL, Plan, cluster
from two_gpus_studies import judge_studies, studies
from two_gpus_training import in_full, judge_training, training

FILE = RESULTS / "two_gpus.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU, with gloo; writes no result")
    parser.add_argument("--part", choices=["training", "studies", "full"], help="only one of the three")
    asked = parser.parse_args()
    plan = SMALL if asked.tiny else LARGE
    if plan.gpus and torch.cuda.device_count() < 2:
        raise SystemExit(f"there are {torch.cuda.device_count()} GPUs; give --tiny to see whether it works")
    figures: dict[str, Any] = {}
    if asked.part and FILE.is_file():
        figures = json.loads(FILE.read_text())["figures"]  # the other parts' stay
    if asked.part in (None, "training"):
        with cluster(plan, 2):
            figures["training"] = training(plan)
        figures["two to one in training"] = judge_training(figures["training"])
        write(figures, plan)
    if asked.part in (None, "studies"):
        figures["studies"] = studies(plan)
        figures["two to one in studies"] = judge_studies(figures["studies"])
        write(figures, plan)
    if asked.part in (None, "full"):
        with cluster(plan, 2):
            figures["stage 2 in full, in shards on two"] = in_full(plan)
        write(figures, plan)


def write(figures: dict[str, Any], plan: Plan) -> None:
    """What was found so far."""
    told, studied = figures.get("two to one in training", {}), figures.get("two to one in studies", {})
    met = (
        len(told) == 2
        and bool(studied)
        and max(item["speed"]["pretrain"] for item in told.values()) >= 1.9
        and max(item["speed"]["finetune"] for item in told.values()) >= 1.8
        and all(max(item["loss_difference"].values()) <= 2**-7 for item in told.values())
        and "error" not in figures.get("stage 2 in full, in shards on two", {"error": "not run"})
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

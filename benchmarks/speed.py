"""What the benchmarks of training speed share: runs with random weights at real shapes, and the peer's training step.

The peer is transformers' LlavaForConditionalGeneration with its stock step: scaled dot-product attention, bfloat16,
encoder and language model frozen, fused AdamW on the projector, the same batch and lengths.

Shape letters: B samples, T positions.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from chiasm.batch import Batch
from chiasm.build import build_vlm
from chiasm.config import RunConfig
from chiasm.prompt import IGNORE, Position, Prompt
from chiasm.vlm import VLM
from chiasm_experiments.training.execution import Execution
from chiasm_experiments.training.files import METRICS
from chiasm_experiments.training.local import run_here
from chiasm_experiments.training.optim import make_optimizer
from chiasm_experiments.training.precision import autocast, place
from chiasm_experiments.training.run import Job

TEXT, ANSWER = 64, 48
"""Positions beside the image's, and those of them that are supervised."""

CLIP = {"name": "clip", "layers": -2}
DINO = {"name": "dinov2", "shape": {"image_size": 336}, "layers": -2}
SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": {},
    "135m": {"width": 576, "depth": 30, "heads": 9, "kv_heads": 3, "mlp_width": 1536, "vocabulary": 49152},
}


def make_run(llm: str, batch: int, **vision: Any) -> RunConfig:
    """Stage 1: the connector learns between a frozen encoder and a frozen language model."""
    name = "mistral" if llm == "mistral-7b" else "causal"
    stage = {
        "name": "pretrain", "data": {"name": "world", "task": "captions", "size": batch},
        "train": ["fusion", "adapter", "tokens"], "lr": 1e-3, "batch_size": batch, "steps": 1,
    }  # fmt: skip
    return RunConfig.model_validate(
        {
            "vision": {"encoders": [CLIP], "adapter": "mlp"} | vision,
            "llm": {"name": name, "shape": SHAPES[llm], "tokenizer": "bytes"},
            "stages": [stage],
            "system": "",
        }
    )


def make_model(run: RunConfig) -> VLM:
    """A run's model on the GPU, drawn there, since a CPU takes minutes for seven billion numbers."""
    device = torch.device("cuda")
    with device:
        vlm = build_vlm(run)
    place(vlm, run, device)
    gc.collect()
    torch.cuda.empty_cache()
    return vlm


def prompt(vlm: VLM, visual: int, generator: torch.Generator, text: int = TEXT, answer: int = ANSWER) -> Prompt:
    """One sample: an image's place of `visual` positions and `text` others, the last `answer` of them supervised."""
    ids = torch.randint(vlm.llm.geometry.vocabulary, (text - 2,), generator=generator).tolist()
    kinds = [Position.LEARNED, *[Position.VISUAL] * visual, Position.LEARNED] if visual else [Position.TEXT] * 2
    head = len(kinds)
    return Prompt(
        "sample",
        [(visual,)] if visual else (),
        [0, *[0] * visual, 1, *ids] if visual else [1, 2, *ids],
        [*kinds, *[Position.TEXT] * len(ids)],
        [*[IGNORE] * (head + len(ids) - answer), *ids[-answer:]],
    )


def our_step(vlm: VLM, run: RunConfig, batches: Callable[[], Batch]) -> Callable[[], Any]:
    """One optimiser step of stage 1 on what `batches` gives, which lies on the GPU."""
    vlm.set_trained(run.stages[0].train)
    vlm.train()
    optimizer = make_optimizer(vlm, run.stages[0])
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> Any:
        batch = batches()
        with autocast(run, torch.device("cuda")):
            loss, tokens = vlm(batch)
        (loss / int(tokens)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


@contextmanager
def captions(images: int, text: int = TEXT, answer: int = ANSWER) -> Iterator[dict[str, Any]]:
    """A data set of JPEGs of 640 x 480 with a caption each, on the disk; sequences are 576 + `text` positions long."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ProcessPoolExecutor() as pool:
            list(pool.map(_draw, [folder / f"{i}.jpg" for i in range(images)], chunksize=32))
        # SOI, EOI, USER, BOT and EOS are the others; the tokenizer has one id for each byte
        turns = [
            {"from": "human", "value": "<image>\n" + "q" * (text - answer - 4)},
            {"from": "gpt", "value": "a" * (answer - 1)},
        ]
        records = [{"id": str(i), "image": f"{i}.jpg", "conversations": turns} for i in range(images)]
        (folder / "data.json").write_text(json.dumps(records))
        yield {"name": "llava", "file": str(folder / "data.json")}


def _draw(path: Path) -> None:
    from PIL import Image

    noise = random.Random(path.name).randbytes(80 * 60 * 3)
    # enlarged noise compresses about as a photograph does
    Image.frombytes("RGB", (80, 60), noise).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)


def loop(run: RunConfig, data: dict[str, Any], epochs: int, **execution: Any) -> dict[str, float]:
    """What `chiasm train` does with a data set on the disk: the middle step of the last epoch, in samples a second."""
    values = run.model_dump(mode="json")
    values["stages"][0] |= {"data": [data], "steps": None, "epochs": epochs}
    with tempfile.TemporaryDirectory() as folder:
        labels = {"trial": "speed", "study": None, "cell": {}}
        settings = Execution.model_validate(
            {"checkpoint_seconds": 3600, "cache_folder": f"{folder}/cache", **execution}
        )
        checked = RunConfig.model_validate(values)
        started = time.perf_counter()
        manifest = run_here(Job(checked.model_dump(mode="json"), f"{folder}/run", labels, settings), quiet=True)
        seconds = time.perf_counter() - started
        rows = [json.loads(line) for line in (Path(folder) / "run" / METRICS).read_text().splitlines()]
    last = rows[-(len(rows) // epochs) + 2 :]
    print(json.dumps({"cache": manifest.get("cache"), "compiled": manifest.get("compiled")}), flush=True)
    middle = {name: statistics.median(row[name] for row in last) for name in ("samples_per_second", "data_wait")}
    return middle | {
        "least": min(row["samples_per_second"] for row in last),
        "steps": len(last),
        "peak_gib": manifest["peak_gpu_bytes"] / 2**30,
        "seconds_in_all": seconds,
    }


def make_peer(llm: str) -> torch.nn.Module:
    """The peer's model on the GPU in bfloat16, everything but its projector frozen."""
    shape = SHAPES[llm]
    if llm == "mistral-7b":
        text: Any = transformers.MistralConfig()
    else:
        text = transformers.LlamaConfig(
            vocab_size=shape["vocabulary"],
            hidden_size=shape["width"],
            intermediate_size=shape["mlp_width"],
            num_hidden_layers=shape["depth"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            max_position_embeddings=2048,
        )
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=text.vocab_size - 1)
    earlier = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = transformers.LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(earlier)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model.train()


def peer_step(model: Any, batch: int, visual: int = 576) -> Callable[[], Any]:
    """The stock training step of the peer on a batch that lies on the GPU."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    pixels = torch.randn(batch, 3, 336, 336, device="cuda", dtype=torch.bfloat16)
    image = model.config.image_token_id
    ids_BT = torch.randint(image, (batch, visual + TEXT), device="cuda")
    ids_BT[:, 1 : 1 + visual] = image
    labels_BT = ids_BT.clone()
    labels_BT[:, :-ANSWER] = IGNORE
    mask_BT = torch.ones_like(ids_BT)

    def step() -> Any:
        loss = model(input_ids=ids_BT, attention_mask=mask_BT, pixel_values=pixels, labels=labels_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.model.multi_modal_projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def rate(step: Callable[[], Any], samples: int, *, warm: int = 3, least: float = 4.0) -> dict[str, float]:
    """Samples a second of a step over at least some seconds, and the most memory it took, in GiB."""
    for _ in range(warm):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < least:
        for _ in range(4):
            step()
            steps += 1
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / steps
    return {
        "samples_per_second": samples / seconds,
        "step_ms": 1000 * seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def matrix_rate(size: int = 8192) -> float:
    """Operations a second of the chip's best bfloat16 matrix product of a few large sizes."""
    best = 0.0
    for m, k, n in ((size, size, size), (10240, 4096, 14336), (16384, 8192, 8192)):
        a, b = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
        for _ in range(5):
            a @ b
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(30):
            a @ b
        torch.cuda.synchronize()
        best = max(best, 30 * 2 * m * k * n / (time.perf_counter() - started))
    return best


def free() -> None:
    """Gives back the memory of what is no longer used."""
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()

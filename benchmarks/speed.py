"""What the benchmarks of training speed share: runs with random weights at real shapes, and the peer's training step.

The peer is transformers' LlavaForConditionalGeneration with its stock step: scaled dot-product attention, bfloat16,
encoder and language model frozen, fused AdamW on the projector, the same batch and lengths.

Every benchmark that is made of these takes `--tiny`: the same steps with models of a few hundred weights, wherever it
is run, to see that it works. It prints what it finds and writes no result.

Shape letters: B samples, T positions.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import statistics
import string
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from chiasm.batch import Batch
from chiasm.build import build_vlm
from chiasm.config import RunConfig
from chiasm.features import Features
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

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Scale:
    """How large models are, and how long is measured.

    Args:
        encoders: by name.
        llms: shapes by name.
        edge: pixels of an encoder's image.
        grid: of its patches.
        width: of its features.
        seconds: of a measurement, to the real one's.
    """

    encoders: dict[str, dict[str, Any]]
    llms: dict[str, dict[str, Any]]
    edge: int
    grid: tuple[int, int]
    width: int
    seconds: float = 1.0

    @property
    def visual(self) -> int:
        """Visual tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def tiny(self) -> bool:
        """Whether it is only to be seen that all works."""
        return self.seconds < 1


LARGE = {"image_size": 336, "patch_size": 14, "width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096}
SMALL = {"image_size": 28, "patch_size": 14, "width": 8, "depth": 2, "heads": 2, "mlp_width": 8}
SMALL_LLM = {"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "mlp_width": 48, "context_length": 2048}
REAL = Scale(
    {
        "clip": {"name": "clip", "layers": -2},
        "dinov2": {"name": "dinov2", "shape": {"image_size": 336}, "layers": -2},
        "siglip": {"name": "siglip", "shape": LARGE, "layers": -2},
    },
    {
        "mistral-7b": {},
        "135m": {"width": 576, "depth": 30, "heads": 9, "kv_heads": 3, "mlp_width": 1536, "vocabulary": 49152},
    },
    edge=336,
    grid=(24, 24),
    width=1024,
)
TINY = Scale(
    {name: {"name": name, "shape": SMALL, "layers": -2} for name in ("clip", "dinov2", "siglip")},
    {"mistral-7b": SMALL_LLM, "135m": SMALL_LLM},
    edge=28,
    grid=(2, 2),
    width=8,
    seconds=0.05,
)


def asked_scale(about: str | None) -> Scale:
    """The scale that the command line asks for.

    Raises:
        SystemExit: real models are asked for and there is no GPU.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models, anywhere; writes no result")
    if parser.parse_args().tiny:
        torch.set_num_threads(1)  # threads of models this small only wait for each other
        return TINY
    if DEVICE.type != "cuda":
        raise SystemExit("there is no GPU; give --tiny to see whether it works")
    return REAL


def make_run(
    llm: str, batch: int, scale: Scale = REAL, encoders: Sequence[str] = ("clip",), **vision: Any
) -> RunConfig:
    """Stage 1: the connector learns between frozen encoders and a frozen language model."""
    name = "mistral" if llm == "mistral-7b" else "causal"
    stage = {
        "name": "pretrain", "data": {"name": "world", "task": "captions", "size": batch},
        "train": ["fusion", "adapter", "tokens"], "lr": 1e-3, "batch_size": batch, "steps": 1,
    }  # fmt: skip
    return RunConfig.model_validate(
        {
            "vision": {"encoders": [scale.encoders[encoder] for encoder in encoders], "adapter": "mlp"} | vision,
            "llm": {"name": name, "shape": scale.llms[llm], "tokenizer": "bytes"},
            "stages": [stage],
            "system": "",
        }
    )


def make_model(run: RunConfig) -> VLM:
    """A run's model on the device, drawn there, since a CPU takes minutes for seven billion numbers."""
    with DEVICE:
        vlm = build_vlm(run)
    place(vlm, run, DEVICE)
    free()
    return vlm


def some_features(images: int, scale: Scale) -> Features:
    """Features of one encoder for some images, on the device."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    return Features(torch.randn(images, 1, scale.visual, scale.width, device=DEVICE, dtype=dtype), scale.grid)


def some_pixels(images: int, scale: Scale) -> torch.Tensor:
    """Pixels of some images, on the device."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    return torch.randn(images, 3, scale.edge, scale.edge, device=DEVICE, dtype=dtype)


def prompt(
    vlm: VLM, visual: int, generator: torch.Generator, text: int = TEXT, answer: int = ANSWER, images: int = 1
) -> Prompt:
    """One sample: places of `visual` positions for each image and `text` others, the last `answer` supervised."""
    images = images if visual else 0
    ids = torch.randint(vlm.llm.geometry.vocabulary, (text - 2 * images,), generator=generator).tolist()
    place_ids = [0, *[0] * visual, 1] * images
    kinds = [Position.LEARNED, *[Position.VISUAL] * visual, Position.LEARNED] * images
    return Prompt(
        "sample",
        [(visual,)] * images,
        [*place_ids, *ids],
        [*kinds, *[Position.TEXT] * len(ids)],
        [*[IGNORE] * (len(kinds) + len(ids) - answer), *ids[-answer:]],
    )


def our_step(vlm: VLM, run: RunConfig, batches: Callable[[], Batch]) -> Callable[[], Any]:
    """One optimiser step of stage 1 on what `batches` gives, which lies on the device."""
    vlm.set_trained(run.stages[0].train)
    vlm.train()
    optimizer = make_optimizer(vlm, run.stages[0])
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> Any:
        batch = batches()
        with autocast(run, DEVICE):
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
        ask = {"from": "human", "value": "<image>\n" + "q" * (text - answer - 4)}
        # letters that cannot be foretold: the loss of one that repeats is soon nothing, and no measure
        letters = random.Random(0)
        answers = ["".join(letters.choices(string.ascii_letters, k=answer - 1)) for _ in range(images)]
        records = [
            {"id": str(i), "image": f"{i}.jpg", "conversations": [ask, {"from": "gpt", "value": said}]}
            for i, said in enumerate(answers)
        ]
        (folder / "data.json").write_text(json.dumps(records))
        yield {"name": "llava", "file": str(folder / "data.json")}


def _draw(path: Path) -> None:
    from PIL import Image

    noise = random.Random(path.name).randbytes(80 * 60 * 3)
    # enlarged noise compresses about as a photograph does
    Image.frombytes("RGB", (80, 60), noise).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)


def loop(
    run: RunConfig, data: dict[str, Any], epochs: int, trace: Path | None = None, **execution: Any
) -> dict[str, float]:
    """What `chiasm train` does with a data set on the disk: the middle step of the last epoch, in samples a second.

    With `profile` among the settings `trace` is where the trace goes.
    """
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
        if trace is not None:
            shutil.copyfile(Path(folder) / "run" / "profile" / "trace.json", trace)
    last = rows[-(len(rows) // epochs) + 2 :]
    print(json.dumps({"cache": manifest.get("cache"), "compiled": manifest.get("compiled")}), flush=True)
    middle = {name: statistics.median(row[name] for row in last) for name in ("samples_per_second", "data_wait")}
    peak = manifest["peak_gpu_bytes"]
    return middle | {
        "least": min(row["samples_per_second"] for row in last),
        "steps": len(last),
        "peak_gib": None if peak is None else peak / 2**30,
        "seconds_in_all": seconds,
    }


def make_peer(llm: str, scale: Scale = REAL) -> torch.nn.Module:
    """The peer's model on the device in bfloat16, everything but its projector frozen."""
    shape = scale.llms[llm]
    if not shape:
        text: Any = transformers.MistralConfig()
    else:
        text = transformers.LlamaConfig(
            vocab_size=shape.get("vocabulary", 512),
            hidden_size=shape["width"],
            intermediate_size=shape["mlp_width"],
            num_hidden_layers=shape["depth"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            max_position_embeddings=2048,
        )
    seen = SMALL if scale.tiny else LARGE
    vision = transformers.CLIPVisionConfig(
        hidden_size=seen["width"], intermediate_size=seen["mlp_width"], num_hidden_layers=seen["depth"],
        num_attention_heads=seen["heads"], image_size=seen["image_size"], patch_size=seen["patch_size"],
        projection_dim=768,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=text.vocab_size - 1)
    earlier = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            model = transformers.LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(earlier)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model.train()


def peer_step(model: Any, batch: int, scale: Scale = REAL) -> Callable[[], Any]:
    """The stock training step of the peer on a batch that lies on the device."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, fused=DEVICE.type == "cuda")
    pixels, visual = some_pixels(batch, scale).to(torch.bfloat16), scale.visual
    image = model.config.image_token_id
    ids_BT = torch.randint(image, (batch, visual + TEXT), device=DEVICE)
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
    wait()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < least:
        for _ in range(4):
            step()
            steps += 1
        wait()
    seconds = (time.perf_counter() - started) / steps
    return {
        "samples_per_second": samples / seconds,
        "step_ms": 1000 * seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0,
    }


def wait() -> None:
    """Until the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(size: int = 8192) -> float:
    """Operations a second of the chip's best bfloat16 matrix product of a few sizes about one."""
    best = 0.0
    for m, k, n in ((size, size, size), (size * 5 // 4, size // 2, size * 7 // 4), (2 * size, size, size)):
        a, b = (torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
        for _ in range(5):
            a @ b
        wait()
        started = time.perf_counter()
        for _ in range(30):
            a @ b
        wait()
        best = max(best, 30 * 2 * m * k * n / (time.perf_counter() - started))
    return best


def free() -> None:
    """Gives back the memory of what is no longer used."""
    gc.collect()
    torch.compiler.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()

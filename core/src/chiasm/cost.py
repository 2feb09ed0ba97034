"""What a run costs, estimated from specs and fake tensors: operations of a sample, and memory of a step.

Shape letters: B views, L layers, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chiasm.adapter import Adapter
from chiasm.config import Part, RunConfig, StageConfig, resolve
from chiasm.encoder import EncoderSpec
from chiasm.features import Features, FeatureSpec
from chiasm.fusion import Fusion
from chiasm.llm import LanguageModelSpec

HALF, FULL = 2, 4
"""Bytes of bfloat16, in which a GPU computes and holds what is frozen, and of float32, for what learns."""
MOMENT_BYTES = {"adamw": 8, "adafactor": 0}
"""Of each trained parameter: two float32 moments; Adafactor's rows and columns are next to nothing."""
LOGIT_BYTES = 16
"""Of each logit: bfloat16, float32, its logarithm of the softmax, and their gradients at the worst moment."""


@dataclass(frozen=True, slots=True)
class SampleSize:
    """The sample for which a cost is given: one image with the most views that it can have, and so much text."""

    text: int = 64
    """Positions of text and learned vectors, the answer's among them."""
    answer: int = 32
    """Supervised positions, and the tokens of a generated answer."""


@dataclass(frozen=True, slots=True)
class ConnectorCost:
    """Fusion and adapter together, for one view."""

    flops: int
    """Of a forward pass."""
    saved_bytes: int
    """Kept for the backward pass."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes that a step holds on a GPU, computing in bfloat16."""

    others: int
    """Weights and moments of all but the language model."""
    llm: int
    """Its own weights and moments, bfloat16 copies left out."""
    copies: int
    """Of what it holds in float32, in bfloat16 to compute with."""
    gathered: int
    """Where its weights are spread over workers (FSDP2): what a worker gathers at once, in bfloat16. Two blocks, one of
    them ahead, and what stands outside of the blocks; with their gradients on the way to the other workers."""
    gradients: int
    """Of all but the language model."""
    llm_gradients: int
    kept: int
    """Of one sample between forward and backward."""
    micro_batch: int
    """Samples at once, or all of a worker's share where that is less."""
    batch: int
    """Samples of a step over all workers."""

    def peak(self, workers: int = 1) -> int:
        """Of each worker; the language model is spread over several. Gradients take the place of activations."""
        llm = self.llm + self.copies if workers == 1 else -(-self.llm // workers) + self.gathered
        activations = min(self.micro_batch, -(-self.batch // workers)) * self.kept
        return self.others + llm + max(activations, self.gradients + -(-self.llm_gradients // workers))


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one stage takes."""

    flops: int
    """Of one sample, forward and backward."""
    memory: StageMemory | None
    """Of a step; None where the language model, or an encoder that learns, does not say what it keeps."""
    micro_batch: int
    """Samples at once for which the memory holds."""

    @property
    def gpu_bytes(self) -> int | None:
        """Peak memory of a step on one GPU in bfloat16."""
        return self.worker_bytes(1)

    def worker_bytes(self, workers: int) -> int | None:
        """That of each of several workers under FSDP2."""
        return None if self.memory is None else self.memory.peak(workers)


@dataclass(frozen=True, slots=True)
class RunCost:
    """What a run takes; a multiply-add counts two operations."""

    sample: SampleSize
    positions: int
    """Of the sample's sequence."""
    encode: int
    """Operations to encode its image."""
    connect: int
    """Of fusion and adapter, forward."""
    llm: int
    """Of the language model, forward."""
    inference: int
    """To answer: encoding, connecting, reading the prompt, and writing the answer with a key-value cache."""
    stages: dict[str, StageCost]

    def summary(self, workers: int = 1) -> dict[str, Any]:
        """As plain values, for `--json`."""
        return {
            "text_positions": self.sample.text,
            "answer_positions": self.sample.answer,
            "positions": self.positions,
            "flops": {
                "encode": self.encode,
                "connect": self.connect,
                "llm": self.llm,
                "inference": self.inference,
                "train": {name: stage.flops for name, stage in self.stages.items()},
            },
            "gpu_bytes": {name: stage.worker_bytes(workers) for name, stage in self.stages.items()},
            "micro_batch": {name: stage.micro_batch for name, stage in self.stages.items()},
        }


def run_cost(
    run: RunConfig,
    encoders: Sequence[EncoderSpec],
    llm: LanguageModelSpec,
    views: int,
    visual_tokens: int,
    parameters: dict[Part, int],
    sample: SampleSize,
) -> RunCost:
    """The cost of a run whose parts fit.

    Args:
        run: the run.
        encoders: the geometry of each encoder.
        llm: that of the language model.
        views: the most views of an image.
        visual_tokens: of an image with so many views.
        parameters: of each part.
        sample: the text beside the image.
    """
    connector = connector_cost(run, [encoder.features for encoder in encoders], llm.width)
    llm_class, llm_config = resolve("llm", run.llm)
    positions = visual_tokens + len(run.tokens.views) * (views - 1) + sample.text
    encode = views * sum(encoder.flops for encoder in encoders)
    connect = views * connector.flops
    forward = llm.flops(positions, sample.answer)
    stages = {}
    for stage in run.stages:
        kept = llm_class.activation_bytes(llm_config, positions, trained="llm" in stage.train)
        seen = encoder_bytes(run) if "encoders" in stage.train else 0
        if kept is None or seen is None:
            kept = None
        else:
            # features that no trained layer keeps are gone when the language model's peak comes
            kept += views * (seen + connector.saved_bytes) + sample.answer * llm.vocabulary * LOGIT_BYTES
        stages[stage.name] = StageCost(
            flops=train_flops(stage, llm, positions, sample.answer, encode, connect),
            memory=None if kept is None else stage_memory(run, stage, llm, parameters, kept),
            micro_batch=_micro_batch(stage),
        )
    return RunCost(sample, positions, encode, connect, forward, encode + connect + forward, stages)


def encoder_bytes(run: RunConfig) -> int | None:
    """Bytes that one view keeps in all encoders of a run between forward and backward; None where one does not say."""
    total = 0
    for ref in run.vision.encoders:
        cls, config = resolve("encoder", ref)
        if not cls.spec(config).parameters:
            continue  # nothing in it learns
        kept: int | None = cls.activation_bytes(config)
        if kept is None:
            return None
        total += kept
    return total


def connector_cost(run: RunConfig, features: Sequence[FeatureSpec], llm_width: int) -> ConnectorCost:
    """The cost of a run's fusion and adapter, by running them on fake tensors: no number is computed."""
    fusion_class, fusion_config = resolve("fusion", run.vision.fusion)
    adapter_class, adapter_config = resolve("adapter", run.vision.adapter)
    fusion, adapter = fusion_config.model_dump_json(), adapter_config.model_dump_json()
    return _connector_cost(fusion_class, fusion, adapter_class, adapter, tuple(features), llm_width)


@lru_cache(maxsize=1024)  # the cells of a study have few connectors, and each takes a good part of a second
def _connector_cost(
    fusion_class: type[Fusion],
    fusion_config: str,
    adapter_class: type[Adapter],
    adapter_config: str,
    features: tuple[FeatureSpec, ...],
    llm_width: int,
) -> ConnectorCost:
    """That of these classes with their configurations as JSON."""
    with FakeTensorMode():
        fusion = fusion_class(fusion_class.Config.model_validate_json(fusion_config), features, llm_width)
        adapter = adapter_class(adapter_class.Config.model_validate_json(adapter_config), fusion.out, llm_width)
        connector = nn.ModuleList([fusion, adapter]).train()

        def forward(views: int) -> Tensor:
            tokens = [torch.empty(views, spec.layers, spec.grid[0] * spec.grid[1], spec.width) for spec in features]
            given = [Features(item, spec.grid) for item, spec in zip(tokens, features, strict=True)]
            visual: Tensor = adapter(fusion(given)).tokens
            return visual

        # with gradients, as the counter fails on views of parameters without; by matrices, as it knows no CPU attention
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            forward(1)
        with torch.autocast("cpu", torch.bfloat16):
            # the difference leaves out the copies of the weights, which do not grow with the views
            saved = saved_bytes(lambda: forward(2), connector) - saved_bytes(lambda: forward(1), connector)
    return ConnectorCost(counter.get_total_flops(), saved)


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, the parameters themselves left out."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    assert result is not None
    return sum(storage.nbytes() for storage in kept.values())


def _micro_batch(stage: StageConfig) -> int:
    """What a stage says; 1 where it is found when the stage starts, since no less can be."""
    return 1 if stage.micro_batch_size == "auto" else stage.micro_batch_size or stage.batch_size


def train_flops(
    stage: StageConfig, llm: LanguageModelSpec, positions: int, answer: int, encode: int, connect: int
) -> int:
    """Forward and backward of one sample: a matrix costs one forward for each of the two gradients that are needed.

    By the usual convention every position goes through every block. The last block's feed-forward part is counted at
    positions that are not supervised too, which nothing reads and a language model may leave out: a spec does not say
    how much of a block it is.
    """
    trained = set(stage.train)
    forward = llm.flops(positions, answer)
    matrices = 2 * (llm.matrix_parameters * positions + llm.head_parameters * answer)
    total = encode + connect + forward
    if "encoders" in trained:
        total += 2 * encode
    if trained & {"fusion", "adapter"}:
        total += 2 * connect
    elif "encoders" in trained:
        total += connect  # gradients on their way to the encoders
    total += matrices + 2 * (forward - matrices)  # gradients of the inputs; attention has no weights but two inputs
    if "llm" in trained:
        total += matrices if llm.trainable == llm.parameters else 2 * llm.trainable * positions
    return total


def stage_memory(
    run: RunConfig, stage: StageConfig, llm: LanguageModelSpec, parameters: dict[Part, int], kept: int
) -> StageMemory:
    """The memory of a step.

    Args:
        run: what any of its stages trains is float32 throughout, and computed with in a bfloat16 copy.
        stage: of the run.
        llm: the geometry of its language model.
        parameters: of each part.
        kept: bytes of one sample between forward and backward.
    """
    before: dict[Part, int] = {part: count for part, count in parameters.items() if part != "llm"}
    others = sum(count * (FULL + HALF if part in run.trained else HALF) for part, count in before.items())
    learning = sum(count for part, count in before.items() if part in stage.train)
    full = llm.trainable if "llm" in run.trained else 0
    still = parameters["llm"] - full
    packed = min(still, llm.matrix_parameters) if llm.matrix_bits else 0
    llm_learning = llm.trainable if "llm" in stage.train else 0
    block, rest = llm.matrix_parameters // llm.depth, max(0, parameters["llm"] - llm.matrix_parameters)
    sent = min(llm_learning, max(block, rest))
    moments = MOMENT_BYTES[stage.optimizer]
    return StageMemory(
        others=others + learning * moments,
        llm=(still - packed) * HALF + packed * (llm.matrix_bits or 0) // 8 + full * FULL + llm_learning * moments,
        copies=full * HALF,
        gathered=(2 * block + rest) * HALF + sent * (HALF + FULL),
        gradients=learning * FULL,
        llm_gradients=llm_learning * FULL,
        kept=kept,
        micro_batch=_micro_batch(stage),
        batch=stage.batch_size,
    )

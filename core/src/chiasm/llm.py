"""The interface of a language model.

Shape letters: B sequences, T positions, S positions that are asked for, E width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypedDict

from torch import Tensor, nn

from chiasm.documents import Documents
from chiasm.errors import ConfigError
from chiasm.part_module import PartModule
from chiasm.recompute import recompute
from chiasm.settings import Settings, Source

FIXED_LLM = (
    "a stage trains the language model, whose quantised weights cannot learn; set llm.lora, or leave llm out of train"
)


class LanguageModelConfig(Settings):
    """What every language model lets a run choose; subclass it to add more."""

    pretrained: Source | None = None
    """Hub id or folder of the weights and the tokenizer; null for random weights, a control."""


@dataclass(frozen=True, slots=True)
class LanguageModelSpec:
    """The geometry of a language model, stated without weights."""

    width: int
    vocabulary: int
    context_length: int
    """Positions at most, visual tokens included."""
    depth: int
    """Blocks in the architecture."""
    parameters: int
    """Parameters that `build` would hold, tied ones once, quantised ones unpacked."""
    chat_template: bool
    """Whether `render_chat` works."""
    trainable: int = -1
    """Parameters that learn where a stage trains the model; 0: none can. Left out: all."""
    matrix_parameters: int = -1
    """Parameters that take part in a matrix product at every position: of the blocks, no embedding and no output
    head. Left out: all but one table of embeddings, so the head is in it where it is not tied."""
    head_parameters: int = -1
    """Parameters of the output head, tied or not. Left out: width x vocabulary."""
    attention_width: int = -1
    """Of the queries of all heads of a block together. Left out: `width`."""
    matrix_bits: int | None = None
    """Bits that a quantised model holds each of its matrix parameters in; None: it is not quantised."""

    def __post_init__(self) -> None:
        table = self.width * self.vocabulary
        for name, value in (
            ("trainable", self.parameters),
            ("matrix_parameters", max(0, self.parameters - table)),
            ("head_parameters", table),
            ("attention_width", self.width),
        ):
            if getattr(self, name) == -1:
                object.__setattr__(self, name, value)

    def flops(self, positions: int, logits: int = 0) -> int:
        """Floating-point operations of one sequence's forward pass (a multiply-add counts two).

        Matrix products alone: 2 for each matrix parameter and position, and 4 x attention width for each pair of a
        position and one that it sees. Causal attention sees half of the square; a kernel that computes all of it,
        and hides the rest, does more. Norms, activations and rotations, well under 1% of a large model, are left out.

        Args:
            positions: of text and images.
            logits: positions at which logits are computed.
        """
        pairs = positions * (positions + 1) // 2
        attention = 4 * pairs * self.attention_width * self.depth
        return 2 * self.matrix_parameters * positions + attention + 2 * self.head_parameters * logits


class Message(TypedDict):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class LanguageModel(PartModule, ABC):
    """Embeddings to hidden states, logits and text, with the model's own tokenizer.

    A subclass sets `Config`, states its geometry in `spec`, and makes itself in `build`.

    Args:
        config: an instance of `Config`; kept, with its geometry, as `config` and `geometry`.
    """

    Config: ClassVar[type[LanguageModelConfig]] = LanguageModelConfig

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.geometry = self.spec(config)

    @classmethod
    @abstractmethod
    def spec(cls, config: LanguageModelConfig) -> LanguageModelSpec:
        """The geometry of `build(config)`, without its weights. May read small files such as config.json.

        Raises:
            CheckpointError: `pretrained` is missing or of another architecture.
        """

    @classmethod
    @abstractmethod
    def build(cls, config: LanguageModelConfig) -> Self:
        """The model with its weights, in float32 on the CPU.

        Random weights (`pretrained: null`) come from torch's global generator: seed it before.

        Raises:
            CheckpointError: `pretrained` is missing, unreadable or of another architecture.
        """

    @classmethod
    @abstractmethod
    def tiny(cls) -> Self:
        """A small instance with random weights for tests: made on the CPU in well under a second."""

    @classmethod
    def activation_bytes(cls, config: LanguageModelConfig, positions: int, *, trained: bool) -> int | None:
        """Bytes that one sequence keeps between forward and backward, with bfloat16 computation on a GPU.

        `chiasm plan` estimates memory with it. None, where it is not known, leaves the estimate out.

        Args:
            config: of the model; no weight is loaded.
            positions: of the sequence.
            trained: the model learns; else only what is before it does.
        """
        return None

    # what learns

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters, by name, that learn where a stage trains the model: all, unless a subclass trains less."""
        return dict(self.named_parameters())

    # how it is executed

    def block_modules(self) -> Sequence[nn.Module]:
        """The blocks in order, each called as a module: sharded over workers one by one. Empty: cannot be sharded."""
        return ()

    def checkpoint_activations(self, on: bool) -> None:
        """Computes each block again in the backward pass, instead of keeping what it computes; gradients are the same.

        Raises:
            ConfigError: the model says of no module that it is a block.
        """
        if on and not self.block_modules():
            raise ConfigError(
                f"{type(self).__name__} names no blocks to compute again; set activation_checkpointing=off"
            )
        for block in self.block_modules():
            recompute(block, on)

    # text

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """The ids of a piece of text, with no BOS or EOS added; special tokens written out in it are recognised."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""

    @property
    @abstractmethod
    def bos_id(self) -> int | None:
        """The id that starts a sequence, None where the model was trained without one."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The id that ends an answer: supervised in training, stops generation."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text, such as BOS and the end of a chat turn."""
        return frozenset(i for i in (self.bos_id, self.eos_id) if i is not None)

    def render_chat(self, messages: Sequence[Message], *, generate: bool) -> str:
        """The model's own chat template; `generate` ends it where the assistant is to speak.

        Raises:
            ValueError: the model has no chat template, or the template refuses these roles.
        """
        raise ValueError(
            f"{type(self).__name__} has no chat template; set tokens.turns to [USER, BOT], or name an instruct model"
        )

    # tensors

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[...]` int64 to embeddings `[..., E]`."""

    @property
    def packs(self) -> bool:
        """Whether `forward_packed` works."""
        return False

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the blocks, or the whole where they are unknown, in place, by `torch.compile` with these arguments.

        One by one, since the code of all blocks is one.
        """
        for block in self.block_modules():
            block.compile(*args, **kwargs)
        if not self.block_modules():
            super().compile(*args, **kwargs)

    @abstractmethod
    def forward(self, embeds_BTE: Tensor, mask_BT: Tensor | None = None, positions_BT: Tensor | None = None) -> Tensor:
        """Embeddings to hidden states `[B, T, E]`, ready for `logits`. Causal: no position sees a later one.

        Args:
            embeds_BTE: embeddings of text, visual and learned tokens.
            mask_BT: True at real positions, False at padding on either side; None: all are real.
            positions_BT: int64 positions; None counts the real positions of each row from 0, so that padding on
                either side gives the same states.
        """

    def forward_packed(self, embeds_1TE: Tensor, documents: Documents) -> Tensor:
        """What `forward` gives for each document of a row alone: `[1, T, E]` to `[1, T, E]`.

        Called where `packs` says so: no position may see another document's, and positions count from 0 in each.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no packed row")

    def forward_at(
        self, embeds_BTE: Tensor, places_S: Tensor, mask_BT: Tensor | None = None, documents: Documents | None = None
    ) -> Tensor:
        """The hidden states of some positions alone, `[S, E]`: those of `forward`, or of `forward_packed`, there.

        Training asks for those at supervised positions. A subclass may leave out what nothing else needs, such as the
        last block's feed-forward part elsewhere.

        Args:
            embeds_BTE: as `forward` takes them, or `forward_packed`.
            places_S: int64; positions of the batch as one long row, b x T + t, in any order. S may be 0.
            mask_BT: as `forward` takes it; None with documents.
            documents: of a packed row, whose B is 1, where the model `packs`; None: each row is one sequence.
        """
        hidden_BTE = self(embeds_BTE, mask_BT) if documents is None else self.forward_packed(embeds_BTE, documents)
        hidden_SE: Tensor = hidden_BTE.flatten(0, 1).index_select(0, places_S)
        return hidden_SE

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states at any positions `[..., E]` to logits `[..., V]`."""

    @abstractmethod
    def generate(self, embeds_BTE: Tensor, mask_BT: Tensor, *, max_new_tokens: int) -> list[list[int]]:
        """Greedy decoding with a key-value cache.

        Args:
            embeds_BTE: the prompts, padded on the left.
            mask_BT: True at real positions.
            max_new_tokens: the longest answer.

        Returns:
            The new ids of each row, without the prompt, ended before the first EOS.
        """

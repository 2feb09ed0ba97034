"""Any causal language model of transformers: Llama, Qwen, Mistral, Phi, GPT-2 and their kin.

Shape letters: B sequences, T positions, S positions that are asked for, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Self

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from chiasm.documents import Documents
from chiasm.errors import CheckpointError, ConfigError
from chiasm.llm import LanguageModel, LanguageModelConfig, LanguageModelSpec, Message
from chiasm_llms.byte_tokenizer import BYTE_VOCABULARY, byte_tokenizer
from chiasm_llms.checkpoint import has_chat_template, load_tokenizer, load_weights, read_config
from chiasm_llms.geometry import geometry, random_weights
from chiasm_llms.last_block import offer_places
from chiasm_llms.lora import add_lora
from chiasm_llms.memory import activation_bytes
from chiasm_llms.packing import decode_packed, decode_unmasked, decodes_unmasked, offer_packing
from chiasm_llms.presets import BY_SOURCE
from chiasm_llms.quantization import quantization
from chiasm_llms.settings import CausalConfig, Shape

_FOR_ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention that takes a new length as it comes."""

_MARK = "\ue000"
"""A private-use character: no template trims or escapes it."""


class CausalLM(LanguageModel):
    """A causal language model of transformers with its tokenizer.

    Subclass it to offer one model with its own `Config`: override `spec` and `build`, and hand the parts to the
    constructor. A tokenizer of the SentencePiece kind, such as Mistral's, starts every piece of text with a space; a
    piece is tokenised as that tokenizer does it.

    Args:
        config: an instance of `Config`.
        model: in eval mode. Its generation settings are replaced: decoding is greedy.
        tokenizer: names an end-of-sequence token.
        learned: names of the model's parameters that learn where a stage trains it, as `add_lora` gives them; None:
            all.

    Raises:
        CheckpointError: the tokenizer has ids that the model has no embedding for.
    """

    Config: ClassVar[type[LanguageModelConfig]] = CausalConfig

    def __init__(
        self,
        config: LanguageModelConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        learned: frozenset[str] | None = None,
    ) -> None:
        super().__init__(config)
        self.model = model
        self.tokenizer = tokenizer
        self._learned = learned
        self._packs = offer_packing(model)
        self._unmasked = self._packs and decodes_unmasked(model)
        # a subclass that computes hidden states by itself is asked for them
        own = type(self).forward is CausalLM.forward and type(self).forward_packed is CausalLM.forward_packed
        self._takes_places = own and offer_places(model, CausalLM.block_modules(self), packs=self._packs)
        self._compiled = False
        # a checkpoint's temperature, penalties and lengths would leak into generate()
        self.model.generation_config = GenerationConfig()
        _check_ids(tokenizer, self.geometry.vocabulary)
        self._specials = frozenset(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._bos_id = _added_bos(tokenizer)
        self._eos_id: int = tokenizer.eos_token_id
        self._stop_ids = {self._eos_id} | self._turn_ends()
        self.eval()

    # making

    @classmethod
    def spec(cls, config: LanguageModelConfig) -> LanguageModelSpec:
        assert isinstance(config, CausalConfig)
        shape = cls._shape(config)
        if config.pretrained is None:
            tokenizer = config.random_tokenizer
            template = tokenizer == "bytes" or cls.has_template(str(tokenizer))
        else:
            template = cls.has_template(config.tokenizer or config.pretrained)
        return geometry(shape, chat_template=template, lora=config.lora, quantize=config.quantize)

    @classmethod
    def activation_bytes(cls, config: LanguageModelConfig, positions: int, *, trained: bool) -> int | None:
        if not isinstance(config, CausalConfig):  # a subclass with settings of its own says what they stand for
            return None
        return activation_bytes(cls._shape(config), config.lora, positions, trained=trained)

    @classmethod
    def _shape(cls, config: CausalConfig) -> PreTrainedConfig:
        """The configuration of transformers that a run's choice stands for."""
        if config.pretrained is None:
            return cls.random_config(config, _vocabulary(config))
        preset = BY_SOURCE.get(config.pretrained)
        shape = read_config(config.pretrained) if preset is None else preset.config()
        cls.check_config(config.pretrained, shape)
        return shape

    @classmethod
    def build(cls, config: LanguageModelConfig) -> Self:
        assert isinstance(config, CausalConfig)
        if config.pretrained is None:
            model = random_weights(cls.random_config(config, _vocabulary(config)))
            tokenizer = _random_tokenizer(config)
        else:
            quantized = None if config.quantize is None else quantization(config.quantize)
            hf_config = read_config(config.pretrained)
            cls.check_config(config.pretrained, hf_config)
            tokenizer = cls.read_tokenizer(config.tokenizer or config.pretrained)
            model = load_weights(config.pretrained, hf_config, quantized)
        learned: frozenset[str] | None = frozenset() if config.quantize else None
        if config.lora is not None:
            learned = add_lora(model, config.lora)
        llm = cls(config, model, tokenizer, learned)
        if config.pretrained is not None:
            llm.check_head()
        return llm

    @classmethod
    def tiny(cls) -> Self:
        shape = {
            "vocabulary": None,
            "width": 32,
            "depth": 2,
            "heads": 4,
            "kv_heads": 2,
            "mlp_width": 64,
            "context_length": 512,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls.build(cls.Config.model_validate({"pretrained": None, "shape": shape}))

    @classmethod
    def check_config(cls, source: str, config: PreTrainedConfig) -> None:
        """Checks the configuration of a checkpoint; a subclass refuses those that it does not take.

        Raises:
            CheckpointError: it is of another architecture, or not what its hub id stands for.
        """
        if source in BY_SOURCE:
            BY_SOURCE[source].check(source, config)

    @classmethod
    def has_template(cls, source: str) -> bool:
        """Whether `read_tokenizer` gives a chat template; known of published models, else read from small files."""
        preset = BY_SOURCE.get(source)
        return has_chat_template(source) if preset is None else preset.chat

    @classmethod
    def read_tokenizer(cls, source: str) -> PreTrainedTokenizerBase:
        """The tokenizer of a checkpoint."""
        return load_tokenizer(source)

    @classmethod
    def random_config(cls, config: CausalConfig, vocabulary: int) -> PreTrainedConfig:
        """The architecture of random weights: Llama's."""
        return LlamaConfig(**shape_arguments(config.architecture, vocabulary))

    def check_head(self) -> None:
        """Checks that logits are the output head's, on the hidden states, and nothing more.

        Raises:
            CheckpointError: the architecture scales or caps them afterwards (Gemma 2, Cohere, Granite).
        """
        rows = self.geometry.vocabulary
        ids_BT = torch.tensor([[rows // 3, rows // 2]], device=self.model.device)
        with torch.no_grad():
            given_BTV = self.logits(self(self.embed(ids_BT)))
            wanted_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
        scale = max(1.0, wanted_BTV.abs().max().item())
        if (given_BTV - wanted_BTV).abs().max().item() > 1e-5 * scale:
            raise CheckpointError(
                f"{type(self.model).__name__} is not supported: it post-processes the logits of its output head "
                "(scales or caps them), and chiasm applies the head to single hidden states; choose a model without"
            )

    # what learns

    def trainable(self) -> dict[str, nn.Parameter]:
        """All parameters; with LoRA its matrices alone; of a quantised model without LoRA none."""
        if self._learned is None:
            return super().trainable()
        return {f"model.{name}": p for name, p in self.model.named_parameters() if name in self._learned}

    # how it is executed

    def block_modules(self) -> Sequence[nn.Module]:
        """The decoder's first list of as many modules as the architecture has blocks."""
        lists = (part for part in self.model.get_decoder().modules() if isinstance(part, nn.ModuleList))
        return next((list(part) for part in lists if len(part) == self.geometry.depth), [])

    # text

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    @property
    def bos_id(self) -> int | None:
        """The id that the tokenizer itself puts before a text; None where it only names one (Qwen, SmolLM2)."""
        return self._bos_id

    @property
    def eos_id(self) -> int:
        return self._eos_id

    @property
    def special_ids(self) -> frozenset[int]:
        return self._specials

    def render_chat(self, messages: Sequence[Message], *, generate: bool) -> str:
        if not self.geometry.chat_template:
            return super().render_chat(messages, generate=generate)
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=generate
            )
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise ValueError(f"the chat template refuses messages of roles {roles}: {error}") from error
        assert isinstance(text, str)
        return text

    # tensors

    def embed(self, ids: Tensor) -> Tensor:
        embeds: Tensor = self.model.get_input_embeddings()(ids)
        return embeds

    @property
    def packs(self) -> bool:
        """Whether the architecture's attention can be told the documents of a row; most of Llama's kin can."""
        return self._packs

    def compile(self, *args: Any, **kwargs: Any) -> None:
        self._compiled = True
        super().compile(*args, **kwargs)

    def forward_packed(self, embeds_1TE: Tensor, documents: Documents) -> Tensor:
        return decode_packed(self.model.get_decoder(), embeds_1TE, documents)

    def forward(self, embeds_BTE: Tensor, mask_BT: Tensor | None = None, positions_BT: Tensor | None = None) -> Tensor:
        return self._decode(embeds_BTE, mask_BT, positions_BT)

    def forward_at(
        self, embeds_BTE: Tensor, places_S: Tensor, mask_BT: Tensor | None = None, documents: Documents | None = None
    ) -> Tensor:
        """As the interface says; of Llama's kin the last block's feed-forward part works at these positions alone."""
        if not self._takes_places:
            return super().forward_at(embeds_BTE, places_S, mask_BT, documents)
        if self._compiled:
            # else the last block would be compiled for one number of positions first, which the next batch has not
            torch._dynamo.maybe_mark_dynamic(places_S, 0)
        if documents is None:
            hidden_1SE = self._decode(embeds_BTE, mask_BT, None, places=places_S)
        else:
            hidden_1SE = decode_packed(self.model.get_decoder(), embeds_BTE, documents, places=places_S)
        return hidden_1SE.squeeze(0)

    def _decode(self, embeds_BTE: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None, **kwargs: Any) -> Tensor:
        if positions_BT is None and mask_BT is not None and not _padded_on_the_right(mask_BT):
            positions_BT = (mask_BT.long().cumsum(-1) - 1).clamp(min=0)
        elif positions_BT is None:
            # causal attention never looks at padding behind it, and without a mask the faster kernels apply
            if self._unmasked:
                return decode_unmasked(self.model.get_decoder(), embeds_BTE, **kwargs)
            mask_BT = None
        elif mask_BT is None:
            # without a mask transformers takes positions that start again for packed documents
            mask_BT = torch.ones(embeds_BTE.shape[:2], dtype=torch.bool, device=embeds_BTE.device)
        output = self.model.get_decoder()(
            inputs_embeds=embeds_BTE,
            attention_mask=None if mask_BT is None else mask_BT.long(),
            position_ids=positions_BT,
            use_cache=False,
            **kwargs,
        )
        hidden_BTE: Tensor = output.last_hidden_state
        return hidden_BTE

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    @torch.no_grad()
    def generate(self, embeds_BTE: Tensor, mask_BT: Tensor, *, max_new_tokens: int) -> list[list[int]]:
        """Greedy decoding with a key-value cache; a chat model's end of turn stops it as EOS does.

        Raises:
            ValueError: `max_new_tokens` is below 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: wanted at least 1, given {max_new_tokens}")
        if not embeds_BTE.shape[0]:
            return []
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self._stop_ids),
            pad_token_id=self._eos_id,  # what stands behind a finished row's end is cut off below
            use_cache=True,
        )
        # compiled blocks would be compiled anew for each length of the cache, and cuDNN's attention made ready
        eager = torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()
        with _in_eval(self.model), eager, sdpa_kernel(_FOR_ANY_LENGTH):
            # of a model that was sharded transformers would wait for other workers, who need not answer as much
            ids_BT = self.model.generate(
                inputs_embeds=embeds_BTE,
                attention_mask=mask_BT.long(),
                generation_config=settings,
                synced_gpus=False,
            )
        # for a prompt of embeddings transformers has no ids to repeat
        assert isinstance(ids_BT, Tensor)
        assert ids_BT.shape[1] <= max_new_tokens, f"{ids_BT.shape[1]} ids for {max_new_tokens} new tokens"
        rows: list[list[int]] = ids_BT.tolist()
        ends = [next((k for k, i in enumerate(row) if i in self._stop_ids), len(row)) for row in rows]
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    def _turn_ends(self) -> set[int]:
        """The first special token that the chat template writes after an answer; empty where there is none."""
        if not self.geometry.chat_template:
            return set()
        messages = [Message(role="user", content="?"), Message(role="assistant", content=_MARK)]
        try:
            after = self.tokenize(self.render_chat(messages, generate=False).rpartition(_MARK)[2])
        except ValueError:  # a template that wants other messages; whoever renders those is told
            return set()
        return set([index for index in after if index in self._specials][:1])


def shape_arguments(shape: Shape, vocabulary: int) -> dict[str, Any]:
    """A shape in the words of transformers' configurations of the Llama family."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _random_tokenizer(config: CausalConfig) -> PreTrainedTokenizerBase:
    source = config.random_tokenizer
    assert source is not None
    return byte_tokenizer() if source == "bytes" else load_tokenizer(source)


def _vocabulary(config: CausalConfig) -> int:
    """Rows of the embedding of random weights."""
    asked, source = config.architecture.vocabulary, config.random_tokenizer
    needed = BYTE_VOCABULARY if source == "bytes" else len(load_tokenizer(str(source)))
    if asked is not None and asked < needed:
        raise ConfigError(f"shape.vocabulary is {asked}, the tokenizer {source!r} needs {needed}; leave it out")
    return asked or needed


def _check_ids(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    # a padding token that was added to a tokenizer alone is never used here
    largest = max(index for index in tokenizer.get_vocab().values() if index != tokenizer.pad_token_id)
    if largest >= vocabulary:
        raise CheckpointError(
            f"the tokenizer {tokenizer.name_or_path!r} has ids up to {largest}, the model has {vocabulary} embeddings; "
            "name the tokenizer that it was trained with"
        )


def _added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a").input_ids[:1] == [bos] else None


def _padded_on_the_right(mask_BT: Tensor) -> bool:
    return not bool((mask_BT[:, 1:] > mask_BT[:, :-1]).any())


@contextmanager
def _in_eval(model: PreTrainedModel) -> Iterator[None]:
    """Puts each module into eval mode, and back into the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

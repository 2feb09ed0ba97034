"""The components of this distribution."""

from collections.abc import Iterator

from chiasm.plugin import Component, hookimpl
from chiasm_llms.presets import PRESETS


@hookimpl
def chiasm_components() -> Iterator[Component]:
    """The language models."""
    yield Component("llm", "causal", "chiasm_llms.causal:CausalLM", "any Hugging Face causal language model")
    yield Component("llm", "mistral", "chiasm_llms.mistral:MistralLM", "Mistral (Mistral-7B-v0.1 and its kin)")
    for preset in PRESETS:
        yield Component("llm", preset.name, f"chiasm_llms.published:{preset.class_name}", preset.source)

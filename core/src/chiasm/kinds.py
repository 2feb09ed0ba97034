"""The four kinds that the core defines; a plugin module like any other."""

from __future__ import annotations

from collections.abc import Iterator

from chiasm.plugin import Kind, hookimpl


@hookimpl
def chiasm_kinds() -> Iterator[Kind]:
    """The kinds of a model's parts."""
    testing = "chiasm.testing"
    yield Kind("encoder", "chiasm.encoder:Encoder", "images to features", f"{testing}.encoder_checks:CHECKS")
    yield Kind(
        "fusion", "chiasm.fusion:Fusion", "features of the encoders to one sequence", f"{testing}.fusion_checks:CHECKS"
    )
    yield Kind(
        "adapter",
        "chiasm.adapter:Adapter",
        "the sequence to visual tokens of the language model's width",
        f"{testing}.adapter_checks:CHECKS",
    )
    yield Kind("llm", "chiasm.llm:LanguageModel", "embeddings to text", f"{testing}.llm_checks:CHECKS")

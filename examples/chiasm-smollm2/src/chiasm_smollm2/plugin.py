"""What this distribution offers to Chiasm."""

from collections.abc import Iterator

from chiasm.plugin import Component, hookimpl


@hookimpl
def chiasm_components() -> Iterator[Component]:
    """One language model."""
    yield Component(
        "llm", "smollm2-135m", "chiasm_smollm2.model:SmolLM2", "SmolLM2-135M-Instruct, weights from a package"
    )

"""SmolLM2 as a Chiasm language model."""

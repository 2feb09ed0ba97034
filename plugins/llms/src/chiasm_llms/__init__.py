"""Language models for Chiasm: Mistral, and any Hugging Face causal language model."""

"""Fusions merge the features of the encoders; adapters turn the result into visual tokens."""

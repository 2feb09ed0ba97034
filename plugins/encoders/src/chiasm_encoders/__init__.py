"""Vision encoders, each with its own preprocessing."""

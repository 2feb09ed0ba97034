"""EfficientNet-Lite0 as a Chiasm encoder."""

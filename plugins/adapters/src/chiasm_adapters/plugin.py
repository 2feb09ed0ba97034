"""The fusions and adapters of this distribution. Light: nothing heavy is imported until one is used."""

from __future__ import annotations

from collections.abc import Iterator

from chiasm.plugin import Component, hookimpl


@hookimpl
def chiasm_components() -> Iterator[Component]:
    """One record for each fusion and adapter."""
    yield Component("fusion", "single", "chiasm_adapters.single:Single", "one encoder, nothing to merge")
    yield Component(
        "fusion",
        "concat_channels",
        "chiasm_adapters.concat_channels:ConcatChannels",
        "all encoders side by side on channels",
    )
    yield Component(
        "fusion",
        "project_sum",
        "chiasm_adapters.project_sum:ProjectSum",
        "each layer projected, then summed (OmniFusion)",
    )
    yield Component(
        "fusion",
        "concat_tokens",
        "chiasm_adapters.concat_tokens:ConcatTokens",
        "each encoder projected, one after the other (OmniFusion, MouSi)",
    )
    yield Component(
        "fusion",
        "project_attention",
        "chiasm_adapters.project_attention:ProjectAttention",
        "each layer projected, then attention with a trained matrix (OmniFusion)",
    )
    yield Component(
        "fusion",
        "layer_scale",
        "chiasm_adapters.layer_scale:LayerScale",
        "each encoder's layers weighed and summed, then channels (COMM)",
    )
    yield Component(
        "fusion",
        "additive",
        "chiasm_adapters.additive:Additive",
        "a convex combination of projected encoders (A-MoF)",
    )
    yield Component(
        "fusion",
        "interleave",
        "chiasm_adapters.interleave:Interleave",
        "tokens of all encoders place by place (I-MoF)",
    )
    yield Component(
        "fusion",
        "cross_attention",
        "chiasm_adapters.cross_attention:CrossAttention",
        "low resolution gathers from high resolution (Mini-Gemini)",
    )
    yield Component(
        "fusion",
        "sva",
        "chiasm_adapters.sva:Sva",
        "a grid of queries, each with its own cell of every encoder (Cambrian-1)",
    )
    yield Component("adapter", "linear", "chiasm_adapters.linear:Linear", "one matrix")
    yield Component("adapter", "mlp", "chiasm_adapters.mlp:Mlp", "linear layers with GELU between (LLaVA-1.5)")
    yield Component(
        "adapter",
        "transformer",
        "chiasm_adapters.transformer:Transformer",
        "self-attention layers, then a matrix (OmniFusion)",
    )
    yield Component("adapter", "identity", "chiasm_adapters.identity:Identity", "nothing, where the width fits already")
    yield Component(
        "adapter",
        "pixel_shuffle",
        "chiasm_adapters.pixel_shuffle:PixelShuffle",
        "neighbouring tokens to channels, then linear layers (InternVL)",
    )
    yield Component(
        "adapter", "avg_pool", "chiasm_adapters.avg_pool:AvgPool", "mean of neighbours, then linear layers (DeCo)"
    )
    yield Component(
        "adapter",
        "resampler",
        "chiasm_adapters.resampler:Resampler",
        "learned latents gather from the tokens (Flamingo)",
    )
    yield Component(
        "adapter", "qformer", "chiasm_adapters.qformer:QFormer", "learned queries in a BERT, cross-attending (BLIP-2)"
    )
    yield Component(
        "adapter",
        "c_abstractor",
        "chiasm_adapters.c_abstractor:CAbstractor",
        "convolutions around a pooling to a square (Honeybee)",
    )
    yield Component(
        "adapter",
        "token_packer",
        "chiasm_adapters.token_packer:TokenPacker",
        "each token gathers from its own region (TokenPacker)",
    )

"""The encoders of this distribution. Light: nothing heavy is imported until one is used."""

from __future__ import annotations

from collections.abc import Iterator

from chiasm.plugin import Component, hookimpl


@hookimpl
def chiasm_components() -> Iterator[Component]:
    """One record for each encoder."""
    yield Component("encoder", "clip", "chiasm_encoders.clip:ClipEncoder", "CLIP ViT, trained with captions")
    yield Component("encoder", "siglip", "chiasm_encoders.siglip:SiglipEncoder", "SigLIP ViT, sigmoid loss, no CLS")
    yield Component("encoder", "dinov2", "chiasm_encoders.dinov2:Dinov2Encoder", "DINOv2 ViT, trained without text")
    yield Component("encoder", "dinov3", "chiasm_encoders.dinov3:Dinov3Encoder", "DINOv3 ViT, trained without text")
    yield Component("encoder", "internvit", "chiasm_encoders.internvit:InternVitEncoder", "InternViT of InternVL")
    yield Component("encoder", "timm", "chiasm_encoders.timm_model:TimmEncoder", "any timm model, CNNs too")
    yield Component("encoder", "blind", "chiasm_encoders.blind:BlindEncoder", "the same for every image: a control")

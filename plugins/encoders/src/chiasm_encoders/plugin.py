"""The encoders of this distribution. Light: nothing heavy is imported until one is used."""

from __future__ import annotations

from collections.abc import Iterator

from chiasm.plugin import Component, hookimpl

PRESETS = (
    ("clip-l-336", "ClipL336", "CLIP ViT-L/14-336"),
    ("clip-bigg-224", "ClipBigG224", "OpenCLIP ViT-bigG/14-224"),
    ("siglip-b-512", "SiglipB512", "SigLIP ViT-B/16-512"),
    ("siglip-so400m-384", "SiglipSo400m384", "SigLIP so400m/14-384"),
    ("siglip2-b-512", "Siglip2B512", "SigLIP 2 ViT-B/16-512"),
    ("siglip2-so400m-384", "Siglip2So400m384", "SigLIP 2 so400m/14-384"),
    ("internvit-300m-448", "InternVit300m448", "InternViT-300M-448 V2.5"),
    ("internvit-6b-448", "InternVit6b448", "InternViT-6B-448 V1.2"),
    ("dinov2-b", "Dinov2B", "DINOv2 ViT-B/14"),
    ("dinov2-l", "Dinov2L", "DINOv2 ViT-L/14"),
    ("dinov2-g", "Dinov2G", "DINOv2 ViT-g/14"),
    ("dinov2-b-reg", "Dinov2BRegisters", "DINOv2 ViT-B/14 with registers"),
    ("dinov2-l-reg", "Dinov2LRegisters", "DINOv2 ViT-L/14 with registers"),
    ("dinov2-g-reg", "Dinov2GRegisters", "DINOv2 ViT-g/14 with registers"),
    ("dinov3-b", "Dinov3B", "DINOv3 ViT-B/16"),
    ("dinov3-l", "Dinov3L", "DINOv3 ViT-L/16"),
)
"""Published checkpoints by name: the name, its class in `presets`, and a summary."""


@hookimpl
def chiasm_components() -> Iterator[Component]:
    """One record for each family, and one for each published checkpoint that has a name of its own."""
    yield Component("encoder", "clip", "chiasm_encoders.clip:ClipEncoder", "CLIP ViT, trained with captions")
    yield Component("encoder", "siglip", "chiasm_encoders.siglip:SiglipEncoder", "SigLIP ViT, sigmoid loss, no CLS")
    yield Component("encoder", "dinov2", "chiasm_encoders.dinov2:Dinov2Encoder", "DINOv2 ViT, trained without text")
    yield Component("encoder", "dinov3", "chiasm_encoders.dinov3:Dinov3Encoder", "DINOv3 ViT, trained without text")
    yield Component("encoder", "internvit", "chiasm_encoders.internvit:InternVitEncoder", "InternViT of InternVL")
    yield Component("encoder", "timm", "chiasm_encoders.timm_model:TimmEncoder", "any timm model, CNNs too")
    yield Component("encoder", "blind", "chiasm_encoders.blind:BlindEncoder", "the same for every image: a control")
    for name, cls, summary in PRESETS:
        yield Component("encoder", name, f"chiasm_encoders.presets:{cls}", summary)

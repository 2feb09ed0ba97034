"""Encoders with one fault each: their preprocessing."""

from __future__ import annotations

import torch
from PIL import Image, ImageOps

from chiasm.image import ImageSpec, to_pixels
from contract_faults.encoders import EDGE, GoodEncoder
from fault_record import Recorder

fault = Recorder("encoder")


@fault("preprocess", r"returned \(6, 3, 8, 16\), declared \(B, 3, H, W\) = \(6, 3, 16, 16\)")
class WrongSize(GoodEncoder):
    """Half the height."""

    def preprocess(self, images, resize="native"):
        return super().preprocess(images, resize)[:, :, : EDGE // 2]


@fault("preprocess", "returned torch.float64, wanted torch.float32")
class DoublePixels(GoodEncoder):
    """Pixels in double precision."""

    def preprocess(self, images, resize="native"):
        return super().preprocess(images, resize).double()


@fault("preprocess", "resize='pad' raised KeyError")
class KnowsThreePolicies(GoodEncoder):
    """Knows three of the four resize policies."""

    def preprocess(self, images, resize="native"):
        return super().preprocess(images, {"native": "native", "crop": "crop", "squash": "squash"}[resize])


@fault("preprocess", "changed the images that it was given")
class ShrinksInPlace(GoodEncoder):
    """Pillow's thumbnail works on the image itself."""

    def preprocess(self, images, resize="native"):
        for image in images:
            image.thumbnail((EDGE, EDGE))
        return super().preprocess(images, resize)


@fault("preprocess", "gives an image other pixels among others")
class NormalisesTheBatch(GoodEncoder):
    """Centres pixels over all images."""

    def preprocess(self, images, resize="native"):
        pixels_B3HW = super().preprocess(images, resize)
        return pixels_B3HW - pixels_B3HW.mean(dim=0, keepdim=True) * (len(images) > 1)


@fault("normalisation", r"undone with the mean \(0\.48, 0\.46, 0\.41\) and std .* that spec states it is")
class AnotherModelsConstants(GoodEncoder):
    """Statistics of another model than the one that spec states."""

    def preprocess(self, images, resize="native"):
        other = ImageSpec(height=EDGE, width=EDGE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), native=self.native)
        return to_pixels(images, other, resize)


@fault("normalisation", "in the order red, green, blue")
class BlueFirst(GoodEncoder):
    """Channels in OpenCV's order."""

    def preprocess(self, images, resize="native"):
        return super().preprocess(images, resize).flip(1)


@fault("normalisation", "normalise with what spec states")
class ForgetsToNormalise(GoodEncoder):
    """Pixels in [0, 1]."""

    def preprocess(self, images, resize="native"):
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return super().preprocess(images, resize) * std + mean


@fault("normalisation", "normalise with what spec states")
class NormalisesTwice(GoodEncoder):
    """Once here and once in the inherited method."""

    def preprocess(self, images, resize="native"):
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (super().preprocess(images, resize) - mean) / std


@fault("resize_policy", "with resize='pad' gives what '(native|crop)' should give")
class IgnoresThePolicy(GoodEncoder):
    """Always what the published processor does."""

    def preprocess(self, images, resize="native"):
        return super().preprocess(images)


@fault("resize_policy", "with resize='native' gives what 'squash' should give .*spec states native='crop'")
class SquashesNatively(GoodEncoder):
    """Its processor squashes, and spec states a crop."""

    def preprocess(self, images, resize="native"):
        return super().preprocess(images, "squash" if resize == "native" else resize)


@fault("resize_policy", "a wide image with resize='pad' gives")
class PadsWithBlackAtOneSide(GoodEncoder):
    """The image at the top, and below it as much again of the picture's last row."""

    def preprocess(self, images, resize="native"):
        if resize != "pad":
            return super().preprocess(images, resize)
        return super().preprocess([image.resize((EDGE, EDGE)) for image in images], "pad")


@fault("resize_details", "seems to use bilinear .* from what spec states: bicubic")
class AnotherFilter(GoodEncoder):
    """Resizes bilinearly, and spec states bicubic."""

    def preprocess(self, images, resize="native"):
        spec = self.geometry.image
        return to_pixels(images, spec.model_copy(update={"interpolation": "bilinear"}), resize)


@fault("resize_details", r"seems to use crop_fraction=0\.875 .* crop_fraction=1\)")
class CropsMore(GoodEncoder):
    """Takes the middle of a larger image, as another model's processor does."""

    def preprocess(self, images, resize="native"):
        spec = self.geometry.image
        return to_pixels(images, spec.model_copy(update={"crop_fraction": 0.875}), resize)


@fault("resize_policy", "resize='pad' is off by .* `pad` fills the rest with the mean colour")
class PadsWithBlack(GoodEncoder):
    """Black borders instead of the mean colour."""

    def preprocess(self, images, resize="native"):
        pixels_B3HW = super().preprocess(images, resize)
        black = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)]).view(1, 3, 1, 1)
        borders = (pixels_B3HW.abs() < 0.02).all(dim=1, keepdim=True) & (resize == "pad")
        return torch.where(borders, black, pixels_B3HW)


@fault("preprocess", "other pixels the second time")
class JittersColours(GoodEncoder):
    """Augments whenever it is called."""

    def preprocess(self, images, resize="native"):
        pixels_B3HW = super().preprocess(images, resize)
        return pixels_B3HW + 0.01 * torch.randn(len(images), 3, 1, 1, generator=self.generator)

    def __init__(self, config) -> None:
        super().__init__(config)
        self.generator = torch.Generator()


@fault("preprocess", "preprocess with resize='native' draws or seeds torch's generator")
class DrawsBeforePixels(GoodEncoder):
    """Throws dice whose result nothing depends on."""

    def preprocess(self, images, resize="native"):
        torch.rand(())
        return super().preprocess(images, resize)


@fault("resize_policy", "gives it mirrored; wanted it as it stands")
class Mirrors(GoodEncoder):
    """Left and right are exchanged."""

    def preprocess(self, images, resize="native"):
        return super().preprocess([ImageOps.mirror(image.convert("RGB")) for image in images], resize)


@fault("resize_details", "resize='squash' seems to use the nearest pixel")
class TakesTheNearestPixel(GoodEncoder):
    """Squashes without a filter."""

    def preprocess(self, images, resize="native"):
        if resize == "squash":
            images = [image.resize((EDGE, EDGE), Image.Resampling.NEAREST) for image in images]
        return super().preprocess(images, resize)


@fault("image_modes", r"transparent \(mode RGBA\) gives other pixels than of the same in RGB on white")
class LaysOnBlack(GoodEncoder):
    """What is transparent becomes what lies under it."""

    def preprocess(self, images, resize="native"):
        return super().preprocess([image.convert("RGB") for image in images], resize)

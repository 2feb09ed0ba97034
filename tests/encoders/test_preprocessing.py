"""Pixels equal those of the published processors, and the other policies do what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from chiasm.errors import CheckpointError
from chiasm.image import fit, read_image, to_pixels
from chiasm_encoders._processor import image_spec
from chiasm_encoders.clip import ClipEncoder
from chiasm_encoders.dinov2 import Dinov2Encoder
from chiasm_encoders.internvit import InternVitEncoder
from chiasm_encoders.siglip import SiglipEncoder

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def _square(edge):
    return {"height": edge, "width": edge}


PROCESSORS = {
    # as the hub's processor files have it for each family's default checkpoint
    "clip": (ClipEncoder, lambda: CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=_square(336))),
    "siglip": (
        SiglipEncoder,
        lambda: SiglipImageProcessorPil(size=_square(512), image_mean=[0.5] * 3, image_std=[0.5] * 3),
    ),
    "dinov2": (
        Dinov2Encoder,
        lambda: BitImageProcessorPil(size={"shortest_edge": 592}, crop_size=_square(518), **IMAGENET),
    ),
    "internvit": (InternVitEncoder, lambda: GotOcr2ImageProcessorPil(size=_square(448), **IMAGENET)),
}
SIZES = [(37, 91), (500, 333), (224, 224), (640, 479), (5, 3)]


def _noise(width, height, channels=3):
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def _files(folder):
    """An image file of each sort that read_image must understand."""
    files = {}
    for width, height in SIZES:
        files[f"{width}x{height}"] = (_noise(width, height), {})
    files["grey"] = (_noise(91, 37, 1), {})
    files["rgba"] = (_noise(64, 91, 4), {})
    files["palette"] = (_noise(70, 50).quantize(16), {})
    files["transparent-palette"] = (_noise(70, 50).quantize(16), {"transparency": 3})
    for name, (image, options) in files.items():
        image.save(folder / f"{name}.png", **options)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    _noise(90, 40).save(folder / "turned.jpg", exif=exif)
    return sorted(folder.iterdir())


def _difference(given, wanted, std):
    """The largest difference in the scale of RGB in [0, 1]."""
    return ((given - wanted).abs() * torch.tensor(std).view(1, 3, 1, 1)).max().item()


def _processed(processor, images):
    """Through the processor image by image, as numpy; pixels are channels first."""
    return torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])


@pytest.mark.parametrize("name", PROCESSORS)
def test_native_pixels_equal_the_published_processor(name, tmp_path):
    encoder, make = PROCESSORS[name]
    images = [read_image(path) for path in _files(tmp_path)]
    assert images[-1].size == (40, 90)
    given = to_pixels(images, encoder.published, "native")
    assert given.dtype == torch.float32
    wanted = _processed(make(), images)
    assert given.shape == wanted.shape
    assert _difference(given, wanted, encoder.published.std) <= 1 / 255


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_file_is_followed(name, checkpoints, tmp_path):
    """Processors that differ from the family's default in every respect that a file can state."""
    encoder, make = PROCESSORS[name]
    processor = type(make())(
        size={"shortest_edge": 20} if name in ("clip", "dinov2") else _square(16),
        crop_size=_square(16),
        resample=2,
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
    )
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").is_file()
    (tmp_path / "config.json").write_bytes((checkpoints(name).folder / "config.json").read_bytes())
    spec = encoder.spec(encoder.Config(pretrained=str(tmp_path))).image
    images = [_noise(*size) for size in SIZES]
    given = to_pixels(images, spec, "native")
    assert _difference(given, _processed(processor, images), spec.std) <= 1 / 255


def test_an_image_of_any_mode_is_taken_as_the_processor_takes_it(photographs, checkpoints):
    """Whoever opens files without read_image."""
    encoder = checkpoints("clip").build()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=_square(16))
    images = [Image.open(path) for path in photographs]
    assert {image.mode for image in images} == {"RGB", "RGBA", "L", "LA", "P", "CMYK", "1"}
    assert any(image.mode == "RGB" and "transparency" in image.info for image in images)
    given = encoder.preprocess(images)
    assert _difference(given, _processed(processor, images), encoder.geometry.image.std) <= 1 / 255
    upright = [image for path, image in zip(photographs, images, strict=True) if path.suffix == ".png"]
    read = [read_image(path) for path in photographs if path.suffix == ".png"]
    for policy in ("pad", "crop", "squash"):
        assert torch.equal(encoder.preprocess(upright, policy), encoder.preprocess(read, policy))


def test_sixteen_bits_are_scaled_to_eight(checkpoints):
    """A processor clips them, and all but the darkest are white."""
    encoder = checkpoints("clip").build()
    grey = _noise(40, 30, 1)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert torch.equal(encoder.preprocess([deep]), encoder.preprocess([grey]))


def test_preprocess_is_the_processor_of_the_encoder(checkpoints):
    encoder = checkpoints("clip").build()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=_square(16))
    images = [_noise(40, 30), _noise(16, 16)]
    pixels = encoder.preprocess(images)
    assert _difference(pixels, _processed(processor, images), encoder.geometry.image.std) <= 1 / 255
    assert encoder(pixels).tokens.shape == (2, 1, 16, 32)
    assert encoder.preprocess([]).shape == (0, 3, 16, 16)


BASE = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize(
    ("encoder", "file", "wanted"),
    [
        (ClipEncoder, {"size": 224, "crop_size": 224, "do_center_crop": True}, ("crop", 1.0)),  # files of 2021
        (ClipEncoder, {"size": {"shortest_edge": 224}}, ("crop", 1.0)),
        (ClipEncoder, {"size": _square(224), "do_center_crop": False}, ("squash", 1.0)),
        (ClipEncoder, {"size": _square(224), "crop_size": _square(224)}, ("squash", 1.0)),
        (SiglipEncoder, {"size": _square(512)}, ("squash", 1.0)),
        (SiglipEncoder, {"size": 512}, ("squash", 1.0)),
        (Dinov2Encoder, {"size": {"shortest_edge": 256}, "crop_size": _square(224)}, ("crop", 0.875)),
        (Dinov2Encoder, {"size": {"shortest_edge": 256}, "do_center_crop": False}, ("crop", 1.0)),
        (InternVitEncoder, {"size": _square(448)}, ("squash", 1.0)),
        (Dinov2Encoder, {}, ("crop", 0.875)),
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["own-file", "nested"])
def test_forms_of_processor_files(encoder, file, wanted, nested, tmp_path):
    content = {**BASE, **file}
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"image_processor": content} if nested else content))
    spec = image_spec(str(tmp_path), (32, 32), encoder.published)
    assert (spec.height, spec.width) == (32, 32)
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (spec.native, spec.crop_fraction) == wanted


def test_a_processor_that_does_not_normalise(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**BASE, "do_normalize": False}))
    spec = image_spec(str(tmp_path), (32, 32), ClipEncoder.published)
    assert (spec.mean, spec.std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"resample": 0}, "resample 0"),
        ({"size": _square(256), "crop_size": _square(224)}, "shortest edge"),
        ({"size": {"shortest_edge": 224}, "crop_size": _square(256)}, "less than or equal to 1"),
        ({"size": {"longest_edge": 224}}, "height"),
        ({"image_mean": [0.5]}, "required"),
    ],
)
def test_a_processor_that_is_not_understood(file, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**BASE, **file}))
    with pytest.raises(CheckpointError, match=message):
        image_spec(str(tmp_path), (32, 32), ClipEncoder.published)


# policies, on an image of three upright bands: red, green and blue


@pytest.fixture
def bands():
    image = Image.new("RGB", (96, 32))
    for index, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        image.paste(colour, (32 * index, 0, 32 * (index + 1), 32))
    return image


def _rgb(encoder, image, resize):
    """The pixels of one policy in [0, 1], `[H, W, 3]`."""
    spec = encoder.published.model_copy(update={"height": 24, "width": 24})
    pixels = to_pixels([image], spec, resize)[0]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
    return (pixels * std + mean).permute(1, 2, 0)


@pytest.mark.parametrize("encoder", [ClipEncoder, SiglipEncoder])
def test_pad_keeps_all_of_the_image_and_its_aspect(encoder, bands):
    rgb = _rgb(encoder, bands, "pad")
    mean = torch.tensor(encoder.published.mean).expand(8, 24, 3)
    torch.testing.assert_close(rgb[:8], mean, rtol=0, atol=0.5 / 255 + 1e-5)  # a third of the height is image
    torch.testing.assert_close(rgb[16:], mean, rtol=0, atol=0.5 / 255 + 1e-5)
    for column, channel in [(2, 0), (12, 1), (21, 2)]:
        torch.testing.assert_close(rgb[8:16, column], torch.eye(3)[channel].expand(8, 3), rtol=0, atol=0.02)


@pytest.mark.parametrize("encoder", [ClipEncoder, SiglipEncoder])
def test_crop_loses_the_borders_and_keeps_the_aspect(encoder, bands):
    rgb = _rgb(encoder, bands, "crop")
    assert rgb[:, 2:-2, 1].min() > 0.98  # the green band is a square in the middle
    assert rgb[:, 2:-2, (0, 2)].max() < 0.02


@pytest.mark.parametrize("encoder", [ClipEncoder, SiglipEncoder])
def test_squash_keeps_all_of_the_image_and_loses_the_aspect(encoder, bands):
    rgb = _rgb(encoder, bands, "squash")
    for column, channel in [(3, 0), (12, 1), (20, 2)]:
        torch.testing.assert_close(rgb[:, column], torch.eye(3)[channel].expand(24, 3), rtol=0, atol=0.02)


@pytest.mark.parametrize("start", ["down", "even"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(3000, 11), (7, 999), (331, 333)])
def test_the_middle_alone_is_the_middle_of_the_whole(size, interpolation, start, monkeypatch):
    spec = ClipEncoder.published.model_copy(
        update={"height": 48, "width": 64, "interpolation": interpolation, "crop_start": start, "crop_fraction": 0.875}
    )
    image = _noise(*size)
    whole = fit(image, (48, 64), "crop", spec)
    monkeypatch.setattr("chiasm.image._MOST_SCALED", 0)
    middle = fit(image, (48, 64), "crop", spec)
    assert middle.size == whole.size == (64, 48)
    assert np.abs(np.asarray(middle, dtype=int) - np.asarray(whole, dtype=int)).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 50_000), (50_000, 1), (20_000, 3)])
@pytest.mark.parametrize("resize", ["native", "pad", "crop", "squash"])
def test_no_image_is_too_long_or_too_small(size, resize, monkeypatch):
    """The shortest edge of one pixel brought to 336 would make the other one sixteen million."""
    made = []
    real = Image.Image.resize

    def note(self, *args, **options):
        made.append(real(self, *args, **options))
        return made[-1]

    monkeypatch.setattr(Image.Image, "resize", note)
    image = Image.new("RGB", size, (10, 200, 30))
    pixels = to_pixels([image], ClipEncoder.published, resize)
    assert pixels.shape == (1, 3, 336, 336)
    assert max(image.width * image.height for image in made) <= 2**24
    if resize != "pad":
        spec = ClipEncoder.published
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
        wanted = (torch.tensor([10, 200, 30]).view(3, 1, 1) / 255 - mean) / std
        torch.testing.assert_close(pixels[0], wanted.expand(3, 336, 336))


def test_a_crop_keeps_the_published_share_of_the_edge():
    """DINOv2's processor keeps the middle 224 of 256: a frame of one part in sixteen is lost on each side."""
    image = Image.new("RGB", (256, 256), (255, 0, 0))
    image.paste((0, 255, 0), (16, 16, 240, 240))
    spec = Dinov2Encoder.published.model_copy(update={"height": 224, "width": 224})
    assert np.asarray(image.crop((16, 16, 240, 240))).min(axis=(0, 1)).tolist() == [0, 255, 0]
    pixels = to_pixels([image], spec, "crop")[0] * torch.tensor(spec.std).view(3, 1, 1)
    assert (pixels.amax((1, 2)) - pixels.amin((1, 2))).max() < 1e-6


@pytest.mark.parametrize(("size", "edge"), [(224, 256), (384, 450), (384, 462), (448, 491)])
def test_every_shortest_edge_survives_as_a_fraction(size, edge):
    """384 / (384 / 450) is a little below 450 in floating point."""
    spec = ClipEncoder.published.model_copy(update={"height": size, "width": size, "crop_fraction": size / edge})
    processor = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=_square(size))
    images = [_noise(70, 60)]
    assert _difference(to_pixels(images, spec, "native"), _processed(processor, images), spec.std) <= 1 / 255

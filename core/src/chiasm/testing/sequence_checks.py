"""The checks that fusions and adapters share: both give one token sequence.

Shape letters: B images, P probes, N tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from chiasm.features import Grid, SequenceSpec, TokenSequence
from chiasm.testing.check import describe
from chiasm.testing.common import calling, require
from chiasm.testing.errors import ContractError
from chiasm.testing.places import Cell, Moved
from chiasm.testing.probe import check_close

STEPS = 3
"""Of training, in which a gradient must have reached the inputs."""

MOST_PLACES = 64
"""Of an input that are changed one by one."""


def check_sequence(sequence: TokenSequence, declared: SequenceSpec, batch: int, after: str = "") -> None:
    """What `forward` returned is what `spec` states."""
    require(
        isinstance(sequence, TokenSequence),
        f"{after}forward returned a {type(sequence).__name__}, wanted a TokenSequence",
    )
    wanted, found = (batch, declared.tokens, declared.width), tuple(sequence.tokens.shape)
    require(found == wanted, f"{after}forward returned {found}, declared (B, N, D) = {wanted}")
    require(
        sequence.grid == declared.grid, f"{after}forward returned the grid {sequence.grid}, declared {declared.grid}"
    )
    if declared.grid is not None:
        places = declared.grid[0] * declared.grid[1]
        require(places == declared.tokens, f"{after}the grid {declared.grid} does not hold {declared.tokens} tokens")
    require(
        sequence.tokens.dtype == torch.float32,
        f"{after}forward of float32 tokens returned {sequence.tokens.dtype}, wanted torch.float32",
    )
    require(bool(sequence.tokens.isfinite().all()), f"{after}forward returned NaN or infinity")


def check_meta(module: nn.Module, make: Callable[[], nn.Module]) -> None:
    """A module made on the meta device has the same parameters, and none with data."""
    with calling("making it under torch.device('meta')"), torch.device("meta"):
        made = make()
    real = [name for name, parameter in made.named_parameters() if not parameter.is_meta]
    require(not real, f"made under torch.device('meta'), {real[0] if real else ''} holds data: name no device")
    found, wanted = (sum(p.numel() for p in m.parameters()) for m in (made, module))
    require(
        found == wanted,
        f"made again from tiny()'s configuration and geometry it holds {found} parameters, tiny() holds {wanted}",
    )


def check_strides(run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """The same values give the same output whatever their order in memory: another part's output may be transposed."""
    with calling("forward"):
        wanted = run(*inputs)
    with calling("forward of an input that is not contiguous in memory (use reshape, not view)"):
        found = run(*(item.transpose(1, 2).contiguous().transpose(1, 2) for item in inputs))
    check_close(found, wanted, "an input that is not contiguous in memory gives another output")


def move_tokens(run: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor], k: int, given: Grid) -> Moved:
    """How far output tokens move when the tokens of input k in one cell of the grid change.

    Args:
        run: token sequences `[P, ..., N, D]` to one output `[P, N, D]`.
        inputs: of one image each.
        k: which of them is changed.
        given: its grid.
    """

    def moved(grid: Grid, cells: list[Cell]) -> Tensor:
        changed = [item.repeat_interleave(len(cells), dim=0) for item in inputs]
        (h, w), item = given, changed[k]
        for p, (i, j) in enumerate(cells):
            tokens = [
                y * w + x
                for y in range(i * h // grid[0], math.ceil((i + 1) * h / grid[0]))
                for x in range(j * w // grid[1], math.ceil((j + 1) * w / grid[1]))
            ]
            item[p, ..., tokens, :] += torch.randn_like(item[p, ..., tokens, :])
        with torch.no_grad():
            moved_PN: Tensor = (run(changed) - run(inputs)).float().norm(dim=-1)
        return moved_PN

    return moved


def check_refused(forward: Callable[[], object], wrong: str, what: str, declared: str) -> None:
    """`forward` raises a ValueError that says something."""
    try:
        forward()
    except ValueError as error:
        require(bool(str(error)), f"forward refuses {what} of another geometry ({wrong}) without saying why")
    except Exception as error:
        raise ContractError(
            f"forward of {what} of another geometry ({wrong}) raised {describe(error)}; wanted a ValueError with both: "
            f"compare them with {declared} first"
        ) from error
    else:
        raise ContractError(
            f"forward takes {what} of another geometry ({wrong}); wanted a ValueError, or images could be mixed: "
            f"compare them with {declared} first"
        )


def input_gradients(
    module: nn.Module, run: Callable[..., Tensor], inputs: Sequence[Tensor], names: Sequence[str]
) -> list[Tensor | None]:
    """Gradients of the inputs, those of a few steps of training added up: a gate may start closed, and open.

    Args:
        module: what learns in between; frozen, it is looked at as it is.
        run: its forward pass.
        inputs: as it takes them.
        names: of the inputs, for messages.

    Raises:
        ContractError: none of them gets any.
    """
    total: list[Tensor | None] = [None] * len(inputs)
    for _ in range(STEPS):
        leaves = [item.detach().clone().requires_grad_() for item in inputs]
        with calling("forward"):
            output = run(*leaves)
        require(
            output.requires_grad, f"no gradient reaches {names[0]}: does forward detach its input or run under no_grad?"
        )
        learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
        loss = (output.float() * torch.randn(output.shape)).sum()
        gradients = torch.autograd.grad(loss, [*leaves, *learned], allow_unused=True)
        for k, gradient in enumerate(gradients[: len(leaves)]):
            before = total[k]
            if gradient is not None:
                total[k] = gradient.abs() if before is None else before + gradient.abs()
        with torch.no_grad():
            for parameter, gradient in zip(learned, gradients[len(leaves) :], strict=True):
                if gradient is not None:
                    parameter.sub_(0.1 * gradient / gradient.norm().clamp(min=1e-12))
    return total


def check_input_gradient(
    module: nn.Module, run: Callable[..., Tensor], inputs: Sequence[Tensor], names: Sequence[str]
) -> None:
    """A gradient that is not zero reaches each input, in every place of it that matters."""
    gradients = input_gradients(module, run, inputs, names)
    for name, gradient in zip(names, gradients, strict=True):
        reached = gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
        require(reached, f"no gradient reaches {name}: its features do not matter, or are detached")
    for k, gradient in enumerate(gradients):
        assert gradient is not None
        places = list(torch.cartesian_prod(*map(torch.arange, gradient.shape[1:-1])).view(-1, gradient.ndim - 2))
        places = places[:: max(1, len(places) // MOST_PLACES)]
        one = [item[:1].expand(len(places), *item.shape[1:]).clone() for item in inputs]
        with torch.no_grad(), calling("forward"):
            before = run(*[item[:1] for item in one])
            for p, place in enumerate(places):
                one[k][p][tuple(place)] += 0.1 * torch.randn(gradient.shape[-1])
            moved_P = (run(*one) - before).float().flatten(1).abs().amax(dim=1)
        still = 1e-4 * float(moved_P.max())
        cut = [
            tuple(place.tolist())
            for p, place in enumerate(places)
            if moved_P[p] > still and not gradient[(slice(None), *place)].any()
        ]
        require(
            not cut,
            f"{names[k]} at {cut[:1]} changes the output and no gradient reaches it there: some places are detached",
        )

"""What a language model promises of how it is executed: its blocks, and what `chiasm plan` reckons with.

Shape letters: B sequences, T positions, E width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chiasm.llm import LanguageModel
from chiasm.testing.check import Check
from chiasm.testing.common import calling, make_tiny, require, some
from chiasm.testing.probe import check_close

SHORT = 8
"""Positions of the shortest sequence whose operations are counted, beside twice and three times as many."""

APART = 0.02
"""Share by which counted operations may be off from stated parameters."""


def blocks(cls: type[LanguageModel]) -> None:
    """`block_modules` names the blocks that `forward` calls, in order, as many as `spec` states; or none."""
    llm = make_tiny(cls).eval()
    with calling("block_modules()"):
        named = list(llm.block_modules())
    if not named:
        return
    depth = llm.geometry.depth
    require(len(named) == depth, f"block_modules names {len(named)} modules, spec states depth = {depth}")
    names = {id(module): name for name, module in llm.named_modules()}
    foreign = [type(block).__name__ for block in named if id(block) not in names]
    require(not foreign, f"block_modules names a {some(foreign)} that is no part of the model")
    called: list[int] = []

    def note(block: nn.Module) -> Callable[..., None]:
        return lambda *_: called.append(id(block))

    distinct = list({id(block): block for block in named}.values())
    handles = [block.register_forward_pre_hook(note(block)) for block in distinct]
    with torch.no_grad(), calling("forward"):
        llm(torch.randn(1, SHORT, llm.geometry.width))
    for handle in handles:
        handle.remove()
    require(
        called == [id(block) for block in named],
        f"block_modules names {some([names[id(block)] for block in named])}; forward calls of them "
        f"{some([names[i] for i in called]) or 'none'}: each is sharded and computed again as a module, so it must be "
        "called as one (block(x), not block.forward(x)), once, in that order",
    )


def checkpointing(cls: type[LanguageModel]) -> None:
    """Computed again in the backward pass, the blocks give the same gradients; only where it names blocks."""
    llm = make_tiny(cls).eval().requires_grad_(True)
    if not llm.block_modules():
        return
    embeds_BTE = torch.randn(2, SHORT, llm.geometry.width)
    plain = _gradients(llm, embeds_BTE, "forward")
    with calling("checkpoint_activations(True)"):
        llm.checkpoint_activations(True)
    again = _gradients(llm, embeds_BTE, "forward with checkpoint_activations")
    with calling("checkpoint_activations(False)"):
        llm.checkpoint_activations(False)
    lost = [name for name in plain if name not in again]
    require(
        not lost, f"checkpoint_activations(True) gives {some(lost)} no gradient: the blocks must compute the same again"
    )
    for name, gradient in plain.items():
        check_close(
            again[name],
            gradient,
            f"checkpoint_activations(True) gives {name} another gradient: the blocks must compute the same again",
            1e-4,
        )


def activations(cls: type[LanguageModel]) -> None:
    """`activation_bytes` is None, or grows with the positions, and with what learns."""
    llm = make_tiny(cls)
    with calling("activation_bytes"):
        known = {
            (n, t): cls.activation_bytes(llm.config, n, trained=t) for n in (SHORT, 2 * SHORT) for t in (False, True)
        }
    if all(value is None for value in known.values()):
        return
    stated = {key: value for key, value in known.items() if isinstance(value, int) and value > 0}
    require(
        len(stated) == len(known),
        f"activation_bytes gives {list(known.values())} for {SHORT} and {2 * SHORT} positions, frozen and trained; "
        "wanted whole numbers above zero, or None each time",
    )
    for trained in (False, True):
        few, many = stated[SHORT, trained], stated[2 * SHORT, trained]
        require(
            many > few,
            f"activation_bytes gives {few} for {SHORT} positions and {many} for {2 * SHORT}: what is kept grows with "
            "them",
        )
    frozen, learning = stated[SHORT, False], stated[SHORT, True]
    require(
        learning >= frozen, f"activation_bytes gives {learning} where the model learns and {frozen} where it does not"
    )


def operations(cls: type[LanguageModel]) -> None:
    """What `spec` states apart from its defaults, of matrices and of the head, is what `forward` and `logits` use."""
    llm = make_tiny(cls).eval()
    stated = llm.geometry
    if stated.matrix_bits is not None:
        return
    table = stated.width * stated.vocabulary
    head = _count(lambda: llm.logits(torch.randn(1, SHORT, stated.width))) / 2 / SHORT
    require(
        stated.head_parameters == table or abs(stated.head_parameters - head) <= APART * max(head, 1),
        f"spec states head_parameters = {stated.head_parameters:,}, logits uses {head:,.0f} at each position",
    )
    if stated.matrix_parameters == max(0, stated.parameters - table):
        return  # not stated: an estimate from the number of parameters
    one, two, three = (_count(lambda n=n: llm(torch.randn(1, n * SHORT, stated.width))) for n in (1, 2, 3))  # type: ignore[misc]
    # attention grows with the square of the positions, matrices with the positions
    square = (three - 2 * two + one) / 2
    used = (two - one - 3 * square) / 2 / SHORT
    require(
        abs(stated.matrix_parameters - used) <= APART * max(used, 1),
        f"spec states matrix_parameters = {stated.matrix_parameters:,}, forward multiplies each position by "
        f"{used:,.0f} numbers: count the matrices of the blocks, no embedding and no output head",
    )


def _count(run: Callable[[], Tensor]) -> float:
    """Operations of matrix products."""
    # by matrices, as the counter knows no attention of the CPU
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), calling("forward"):
        run()
    return float(counter.get_total_flops())


def _gradients(llm: LanguageModel, embeds_BTE: Tensor, what: str) -> dict[str, Tensor]:
    llm.zero_grad(set_to_none=True)
    leaf = embeds_BTE.clone().requires_grad_()
    with calling(what):
        loss = (llm(leaf) * torch.linspace(-1, 1, embeds_BTE.shape[-1])).sum()
    with calling(f"the backward pass of {what}"):
        torch.autograd.backward(loss)
    found = {name: p.grad for name, p in llm.named_parameters() if p.grad is not None}
    return found | ({} if leaf.grad is None else {"the embeddings": leaf.grad})


EXECUTION_CHECKS: tuple[Check, ...] = (blocks, checkpointing, activations, operations)

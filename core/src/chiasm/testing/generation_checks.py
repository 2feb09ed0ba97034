"""What a language model promises of `generate`, against greedy decoding by whole forward passes.

Shape letters: B sequences, T positions, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from chiasm.llm import LanguageModel
from chiasm.testing.check import Check
from chiasm.testing.common import calling, make_tiny, require
from chiasm.testing.errors import ContractError
from chiasm.testing.probe import check_close
from chiasm.testing.process import random_numbers_kept

NEW = 6
"""Tokens that are asked for."""

LENGTHS = (4, 2, 5)
"""Positions of the prompts."""

ENDS = (2, NEW, 0)
"""After how many tokens each prompt's answer ends; the second one does not."""

STEPS = 400


def generation_equals_recomputation(cls: type[LanguageModel]) -> None:
    """Cached generation gives the greedy tokens that whole forward passes give."""
    llm = make_tiny(cls).eval()
    for prompt_TE in _prompts(llm):
        row = _generate(llm, [prompt_TE])[0]
        _check_row(llm, row, _greedy(llm, prompt_TE), "a single prompt")


def generation_stops(cls: type[LanguageModel]) -> None:
    """Generation ends before the first EOS, and at `max_new_tokens`."""
    llm = _taught(make_tiny(cls))
    for prompt_TE in _prompts(llm):
        wanted = _greedy(llm, prompt_TE)
        _check_row(llm, _generate(llm, [prompt_TE])[0], wanted, "a single prompt")
        few = _generate(llm, [prompt_TE], 1)[0]
        require(
            few == wanted[:1], f"generate with max_new_tokens=1 returned {few}, wanted {wanted[:1]}: only new tokens"
        )


def generation_in_batches(cls: type[LanguageModel]) -> None:
    """A batch that is padded on the left gives each prompt the answer that it gets alone."""
    llm = make_tiny(cls).eval()
    # random weights show small errors, as their tokens differ by little; taught ones show rows that end before others
    for model, seed in ((llm, 3), (llm, 4), (llm, 5), (_taught(make_tiny(cls)), 3)):
        prompts = _prompts(model, seed)
        rows = _generate(model, prompts)
        require(len(rows) == len(prompts), f"generate of {len(prompts)} prompts returned {len(rows)} rows")
        for i, (row, prompt_TE) in enumerate(zip(rows, prompts, strict=True)):
            _check_row(model, row, _greedy(model, prompt_TE), f"prompt {i} of a batch padded on the left")


def generation_leaves_no_trace(cls: type[LanguageModel]) -> None:
    """Generation keeps nothing: the same prompt gives the same answer later, and the model is as it was."""
    llm = make_tiny(cls).eval()
    prompts = _prompts(llm)
    with torch.no_grad(), calling("forward"):
        before = llm(prompts[0].unsqueeze(0))
    first = _generate(llm, prompts[:1])
    longest = prompts[0].unsqueeze(0)
    with random_numbers_kept("generate"), torch.no_grad():
        llm.generate(longest, torch.ones(longest.shape[:2], dtype=torch.bool), max_new_tokens=NEW)
    _generate(llm, prompts[1:])
    again = _generate(llm, prompts[:1])
    require(
        first == again, f"the same prompt gives {first[0]}, and {again[0]} after others: generate keeps a cache of them"
    )
    with torch.no_grad(), calling("forward after generate"):
        after = llm(prompts[0].unsqueeze(0))
    check_close(after, before, "forward gives other hidden states after generate: a cache is kept")
    for mode in (False, True):
        llm.train(mode)
        modes = [part.training for part in llm.modules()]
        _generate(llm, prompts[:1])
        require(
            modes == [part.training for part in llm.modules()],
            f"generate leaves the model in another mode than it found it, training={mode}",
        )


def _prompts(llm: LanguageModel, seed: int = 3) -> list[Tensor]:
    """Embeddings of no token, as visual tokens are; the same in every call."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, llm.geometry.width, generator=generator) for length in LENGTHS]


def _generate(llm: LanguageModel, prompts: list[Tensor], new: int = NEW) -> list[list[int]]:
    longest = max(len(prompt) for prompt in prompts)
    # what stands at padding must not matter
    noise_TE = 3 * torch.randn(longest, llm.geometry.width)
    embeds_BTE = torch.stack([torch.cat([noise_TE, prompt])[-longest:] for prompt in prompts])
    mask_BT = torch.tensor([[i >= longest - len(prompt) for i in range(longest)] for prompt in prompts])
    before = embeds_BTE.clone(), mask_BT.clone()
    with calling("generate"), torch.no_grad():
        rows = llm.generate(embeds_BTE, mask_BT, max_new_tokens=new)
    kept = torch.equal(before[0], embeds_BTE) and torch.equal(before[1], mask_BT)
    require(kept, "generate changes the embeddings or the mask that it is given in place: work on new tensors")
    whole = isinstance(rows, list) and all(isinstance(row, list) and all(type(i) is int for i in row) for row in rows)
    require(whole, f"generate returned {rows!r}, wanted a list of ints for each prompt")
    return rows


@torch.no_grad()
def _greedy(llm: LanguageModel, prompt_TE: Tensor, new: int = NEW) -> list[int]:
    """Greedy decoding without a cache."""
    row: list[int] = []
    while len(row) < new:
        with calling("forward"):
            ids = torch.tensor(row, dtype=torch.int64)
            hidden_BTE = llm(torch.cat([prompt_TE, llm.embed(ids)]).unsqueeze(0))
            token = int(llm.logits(hidden_BTE[:, -1]).argmax())
        if token == llm.eos_id:
            break
        row.append(token)
    return row


def _check_row(llm: LanguageModel, row: list[int], wanted: list[int], where: str) -> None:
    if row == wanted:
        return
    facts = f"generate returned {row} for {where}, greedy decoding by whole forward passes gives {wanted}"
    padded = " of a padded prompt" if "batch" in where else ""
    hint = f"look at positions, mask and cache{padded}, and at penalties of the generation settings"
    if len(row) > NEW:
        raise ContractError(f"{facts}: more than max_new_tokens={NEW}; is the prompt returned too?")
    if llm.eos_id in row:
        raise ContractError(f"{facts}: EOS ({llm.eos_id}) is among them; end each row before the first EOS")
    if len(row) > len(wanted) and row[: len(wanted)] == wanted:
        raise ContractError(f"{facts}: it does not stop at EOS ({llm.eos_id}); else {hint}")
    if row == wanted[: len(row)]:
        raise ContractError(
            f"{facts}: it ends early; only EOS ({llm.eos_id}) and max_new_tokens={NEW} end an answer; else {hint}"
        )
    raise ContractError(f"{facts}: {hint}, at sampling, and at what is cut from the front")


def _taught(llm: LanguageModel) -> LanguageModel:
    """Trains a tiny model until it ends its answers to the prompts as `ENDS` says, and repeats itself in them.

    A random one says EOS once in a vocabulary, so nothing would be seen of stopping, nor of a penalty on repeats.
    """
    prompts = _prompts(llm)
    plain = [i for i in range(llm.geometry.vocabulary) if i not in llm.special_ids]
    answers = [
        [plain[(7 * row + 3 * (i // 2 if end == NEW else i)) % len(plain)] for i in range(end)]
        for row, end in enumerate(ENDS)
    ]
    targets = [answer + [llm.eos_id] * (len(answer) < NEW) for answer in answers]
    llm.train().requires_grad_(True)
    optimizer = torch.optim.Adam(llm.parameters(), lr=1e-2)
    for _ in range(STEPS):
        losses = []
        for prompt_TE, target in zip(prompts, targets, strict=True):
            ids = torch.tensor(target)
            sequence_TE = torch.cat([prompt_TE, llm.embed(ids[:-1])])
            with calling("training"):
                logits = llm.logits(llm(sequence_TE.unsqueeze(0))[0, len(prompt_TE) - 1 :])
            losses.append(F.cross_entropy(logits.float(), ids, reduction="none"))
        worst = torch.cat(losses)
        if float(worst.detach().max()) < 0.2:
            break
        optimizer.zero_grad()
        torch.autograd.backward(worst.mean())
        optimizer.step()
    llm.eval().requires_grad_(False)
    ended = [len(_greedy(llm, prompt)) for prompt in prompts]
    require(
        any(0 < length < NEW for length in ended) and len(set(ended)) > 1,
        f"trained for {STEPS} steps to end answers to {len(prompts)} prompts after {ENDS} tokens, it ends them after "
        f"{ended}: it does not learn, so nothing can be said of where it stops",
    )
    return llm


GENERATION_CHECKS: tuple[Check, ...] = (
    generation_equals_recomputation,
    generation_stops,
    generation_in_batches,
    generation_leaves_no_trace,
)

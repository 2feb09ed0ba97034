"""Samples made ready ahead of the model, by processes beside it."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from chiasm.errors import ChiasmError
from chiasm.sample import Sample
from chiasm_experiments.data.feed import Example, Feed

CHUNK = 16
"""Samples that a process makes ready at a time: a step's samples come from several processes at once."""
STEPS_AHEAD = 2
"""Steps whose known features are read while the model is at work."""
AHEAD_BYTES = 2**32
"""Pinned memory that they may take; features of all layers of a large batch are not read ahead."""
SENT_SHARE = 0.01
"""Of a GPU's memory that they may take there, where they are copied to while it computes."""


class Samples(Protocol):
    """A data set, or several as one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


def load_steps(
    steps: Iterable[Sequence[int]],
    samples: Samples,
    feed: Feed,
    device: torch.device,
    processes: int = 0,
    context: str | None = None,
) -> Iterator[list[Example]]:
    """The examples of each step, the same for any number of processes.

    Args:
        steps: the samples of each step, by index.
        samples: of the stage.
        feed: makes them ready.
        device: where they go.
        processes: that make samples ready; 0: this one does, when a step is asked for.
        context: how processes start: `fork`, `forkserver` or `spawn`; None: `fork` where the system has it, since a
            fork starts at once and shares the data set's memory.

    Raises:
        DataError: a sample cannot be used; the message or a note names it.
    """
    steps = [list(step) for step in steps]
    if processes == 0:
        made: Iterator[list[Example]] = ([_make(feed, samples, i) for i in step] for step in steps)
    else:
        made = _from_processes(steps, samples, feed, device, processes, context)
    return _read_ahead(made, feed, device) if device.type == "cuda" and feed.features else made


def _make(feed: Feed, samples: Samples, index: int) -> Example:
    try:
        return feed.train(samples[index])
    except Exception as error:
        error.add_note(f"(sample {index} of the stage's data)")
        raise


def _from_processes(
    steps: Sequence[Sequence[int]],
    samples: Samples,
    feed: Feed,
    device: torch.device,
    processes: int,
    context: str | None,
) -> Iterator[list[Example]]:
    # said before a fork, or tokenizers says it after one on standard error
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    feed.flush()  # no thread of ours holds a lock at the fork
    if context is None:
        context = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    chunks = [list(step[first : first + CHUNK]) for step in steps for first in range(0, len(step), CHUNK)]
    longest = max((-(-len(step) // CHUNK) for step in steps), default=1)
    loader: DataLoader[Any] = DataLoader(
        _Examples(samples, feed),
        batch_sampler=chunks,
        num_workers=processes,
        collate_fn=_pack,
        multiprocessing_context=context,
        pin_memory=device.type == "cuda",
        prefetch_factor=max(2, -(-2 * longest // processes)),  # two steps, and no process without work
        worker_init_fn=partial(_begin, feed if context == "fork" else None),
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of every fork beside threads; the children take no lock but their own, and no GPU
        warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
        ready = iter(loader)
    for step in steps:
        examples: list[Example] = []
        for packed in islice(ready, -(-len(step) // CHUNK)):
            examples += _unpack(*packed)
        yield examples


def _read_ahead(made: Iterator[list[Example]], feed: Feed, device: torch.device) -> Iterator[list[Example]]:
    """Known features are read from the disk by a thread, steps before they are asked for, and sent to the GPU."""

    beside = _Beside(device)

    def read(examples: list[Example], *, send: bool) -> list[Example]:
        feed.fetch(examples, pin=True)
        if send:
            with beside:
                feed.send(examples, device)
        return examples

    # pinned memory belongs to a device, and a thread begins on the first one
    index = torch.cuda.current_device() if device.index is None else device.index
    with ThreadPoolExecutor(1, "chiasm-ahead", torch.cuda.set_device, (index,)) as thread:
        ahead: deque[Future[list[Example]]] = deque()
        room = SENT_SHARE * torch.cuda.get_device_properties(index).total_memory
        for examples in made:
            views = sum(len(image) for example in examples for image in example.prompt.views)
            size = views * sum(features.shelf.view_bytes for features in feed.features if features.shelf is not None)
            steps = min(STEPS_AHEAD, AHEAD_BYTES // max(1, size))
            # those ahead, and those that are in use
            task = partial(read, send=(STEPS_AHEAD + 1) * size <= room) if steps else list
            ahead.append(thread.submit(task, examples))
            while len(ahead) > steps:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class _Beside:
    """What a GPU is given here it does beside what it computes, and has done in the end.

    One stream for all times, since memory that one stream has used is not given to another.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __enter__(self) -> None:
        self._entered = torch.cuda.stream(self._stream)
        self._entered.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)
        self._stream.synchronize()


class _Examples(Dataset[Any]):
    """Samples made ready in the loader's processes; a user's error comes back as a value, to be raised whole."""

    def __init__(self, samples: Samples, feed: Feed) -> None:
        self.samples = samples
        self.feed = feed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example | ChiasmError:
        try:
            return _make(self.feed, self.samples, index)
        except ChiasmError as error:
            return error

    def __getstate__(self) -> dict[str, Any]:
        # for processes that are not forked: the model without its weights, which the loader never touches
        file = io.BytesIO()
        _WithoutTensors(file, pickle.HIGHEST_PROTOCOL).dump(self.__dict__)
        return {"pickled": file.getvalue()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(pickle.loads(state["pickled"]))


class _WithoutTensors(pickle.Pickler):
    def reducer_override(self, item: Any) -> Any:
        return (torch.empty, (0,)) if isinstance(item, Tensor) else NotImplemented


def _begin(feed: Feed | None, _: int) -> None:
    """What a loader process does first."""
    for features in feed.features if feed is not None else ():
        if features.shelf is not None:
            features.shelf.forked()


Packed = tuple[list[Any], list[int], Tensor, list[Tensor], list[list[list[int]]]]


_NOTHING = torch.empty(3, 0, dtype=torch.int32)


def _pack(items: list[Example | ChiasmError]) -> Packed:
    """A chunk with all positions in one tensor, and the pixels of each encoder: few pieces of shared memory."""
    stacks: list[Tensor] = []
    counts: list[list[list[int]]] = []
    for item in items:
        if isinstance(item, ChiasmError):
            return [item], [], torch.empty(0), [], []
    examples = [item for item in items if isinstance(item, Example)]
    for k in range(max((len(example.pixels) for example in examples), default=0)):
        views = [list(example.pixels[k]) if example.pixels else [] for example in examples]
        flat = [pixels for mine in views for pixels in mine]
        stacks.append(torch.cat(flat) if flat else torch.empty(0))
        counts.append([[len(pixels) for pixels in mine] for mine in views])
    values_3T = torch.cat([example.prompt.values_3T for example in examples], dim=1)
    bare = [Example(replace(e.prompt, values_3T=_NOTHING), e.images, e.keys, ((),) * len(e.pixels)) for e in examples]
    return bare, [len(example.prompt) for example in examples], values_3T, stacks, counts


def _unpack(
    examples: list[Any], lengths: list[int], values_3T: Tensor, stacks: list[Tensor], counts: list[list[list[int]]]
) -> list[Example]:
    for example in examples:
        if isinstance(example, ChiasmError):
            raise example
    for example, mine_3T in zip(examples, torch.split(values_3T, lengths, dim=1), strict=True):
        example.prompt = replace(example.prompt, values_3T=mine_3T)
    each = [
        iter(torch.split(stack, [views for mine in count for views in mine]))
        for stack, count in zip(stacks, counts, strict=True)
    ]
    for i, example in enumerate(examples):
        if example.pixels:
            example.pixels = tuple(
                tuple(next(views) for _ in count[i]) for views, count in zip(each, counts, strict=True)
            )
    return examples

"""The JSON format of LLaVA's instruction data (arXiv 2304.08485), which most published mixtures use."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from chiasm.errors import DataError
from chiasm.sample import ImageFile, Sample, Turn
from chiasm.settings import FilePath, Settings
from chiasm_experiments.interfaces import Dataset

DECODED = 500
"""How many images a check decodes in full; of all, the header is read, and the end is looked at."""

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
"""The last marker of a file by Pillow's name of its format; padding may follow."""


class LlavaConfig(Settings):
    """Where the data lies."""

    file: FilePath
    """A JSON list, or a line of JSON for each sample (.jsonl), of `{id, image, conversations}`. `conversations`
    alternates `{"from": "human", "value": ...}` and `{"from": "gpt", "value": ...}`; `image` is a path, a list of
    paths, or absent for text alone."""
    images: FilePath | None = None
    """Folder of the images; null: the file's own."""
    limit: int | None = Field(default=None, gt=0)
    """Take the first samples only."""


class LlavaDataset(Dataset):
    """Samples of one JSON file in LLaVA's format."""

    Config = LlavaConfig
    config: LlavaConfig

    @classmethod
    def tiny(cls) -> Self:
        import tempfile

        from PIL import Image

        folder = Path(tempfile.mkdtemp(prefix="chiasm-llava-"))
        Image.new("RGB", (12, 8), "red").save(folder / "red.png")
        turns = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": "Red"}]
        samples = [{"id": "a", "image": "red.png", "conversations": turns}]
        samples += [{"id": "b", "conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}]
        (folder / "data.json").write_text(json.dumps(samples))
        return cls(LlavaConfig(file=folder / "data.json"))

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        file = self.config.file
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data file {str(file)!r} cannot be read: {error}") from error
        if file.suffix == ".jsonl":
            # not splitlines, which also splits at characters that JSON may hold
            lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
            records = [_parse(line, f"line {number} of data file {str(file)!r}") for number, line in lines]
        else:
            records = _parse(text, f"data file {str(file)!r}")
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise DataError(
                f"data file {str(file)!r} holds no list of samples; wanted [{{id, image, conversations}}, ...]"
            )
        return records[: self.config.limit]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record = self._records[index]
        name = f"{self.config.file.name}:{record.get('id', index)}"
        folder = self.config.images or self.config.file.parent
        images = record.get("image") or []
        paths = [images] if isinstance(images, str) else images
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise DataError(f"sample {name!r}: image must be a path or a list of paths, given {images!r}")
        messages = _messages(record.get("conversations", []), name)
        roles = [role for role, _ in messages]
        if not messages or roles != ["human", "gpt"] * (len(messages) // 2):
            raise DataError(f"sample {name!r}: conversations must alternate human and gpt, found {roles}")
        turns = tuple(Turn(messages[i][1], messages[i + 1][1]) for i in range(0, len(messages), 2))
        return Sample(name, turns, tuple(ImageFile(folder / path) for path in paths))

    def check(self) -> None:
        """Reads every record, looks at every image's start and end, and decodes up to `DECODED`, evenly spaced."""
        if not len(self):
            raise DataError(f"data file {str(self.config.file)!r} is empty: it holds no sample")
        paths: dict[Path, str] = {}
        for sample in self:
            for image in sample.images:
                assert isinstance(image, ImageFile)
                paths.setdefault(image.path, sample.id)
        missing = [(path, owner) for path, owner in paths.items() if not path.is_file()]
        if missing:
            path, owner = missing[0]
            raise DataError(
                f"image {str(path)!r} of sample {owner!r} {'is no file' if path.exists() else 'does not exist'} "
                f"({len(missing)} of {len(paths)} are missing); set `images` to their folder"
            )
        files = list(paths)
        with ThreadPoolExecutor() as threads:
            for path, error in zip(files, threads.map(_damage, files), strict=True):
                if error is not None:
                    raise DataError(f"image {str(path)!r} of sample {paths[path]!r} cannot be decoded: {error}")
        for path in files[:: max(1, len(files) // DECODED)]:
            try:
                ImageFile(path).load()
            except DataError as error:
                raise DataError(f"{error} (sample {paths[path]!r})") from error


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name} is not JSON: {error}") from error


def _messages(conversations: Any, name: str) -> list[tuple[str, str]]:
    """Who says what.

    Raises:
        DataError: a message is not what LLaVA writes.
    """
    messages = []
    for item in conversations if isinstance(conversations, list) else [conversations]:
        value = item.get("value") if isinstance(item, dict) else None
        if not isinstance(value, str):
            raise DataError(
                f'sample {name!r}: conversations must be a list of {{"from": human or gpt, "value": text}}, '
                f"found {item!r}"
            )
        # LLaVA writes the marker on a line of its own; the line break belongs to the marker
        text = value.replace("<image>\n", "<image>").replace("\n<image>", "<image>")
        messages.append((str(item.get("from")), text))
    return messages


def _damage(path: Path) -> str | None:
    """What is wrong with an image file, as its header and its end tell; a file of doubtful end is decoded."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if not _ends_well(path, image.format):
                image.load()
            return None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error)


def _ends_well(path: Path, form: str | None) -> bool:
    """Whether a file ends as its format does, which one that was cut off, by a download say, does not."""
    if form not in _ENDS:
        return False
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 32), os.SEEK_END)
        return _ENDS[form] in file.read()

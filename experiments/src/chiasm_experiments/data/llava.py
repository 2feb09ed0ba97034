"""The JSON format of LLaVA's instruction data (arXiv 2304.08485), which most published mixtures use."""

from __future__ import annotations

import json
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
"""How many images a check decodes in full; the headers of all are read."""


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
        try:
            if file.suffix == ".jsonl":
                records = [json.loads(line) for line in text.splitlines() if line.strip()]
            else:
                records = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"data file {str(file)!r} is not JSON: {error}") from error
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
        images = record.get("image") or []
        folder = self.config.images or self.config.file.parent
        paths = [images] if isinstance(images, str) else images
        # LLaVA writes the marker on a line of its own; the line break belongs to the marker
        messages = [
            (
                item.get("from"),
                str(item.get("value", "")).replace("<image>\n", "<image>").replace("\n<image>", "<image>"),
            )
            for item in record.get("conversations", [])
        ]
        roles = [role for role, _ in messages]
        if not messages or roles != ["human", "gpt"] * (len(messages) // 2):
            raise DataError(f"sample {name!r}: conversations must alternate human and gpt, found {roles}")
        turns = tuple(Turn(messages[i][1], messages[i + 1][1]) for i in range(0, len(messages), 2))
        return Sample(name, turns, tuple(ImageFile(folder / path) for path in paths))

    def check(self) -> None:
        """Reads every record, opens every image file, and decodes up to `DECODED` of them, evenly spaced."""
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
                f"image {str(path)!r} of sample {owner!r} does not exist ({len(missing)} of {len(paths)} are missing); "
                "set `images` to their folder"
            )
        files = list(paths)
        with ThreadPoolExecutor() as threads:
            for path, error in zip(files, threads.map(_header_error, files), strict=True):
                if error is not None:
                    raise DataError(f"image {str(path)!r} of sample {paths[path]!r} cannot be decoded: {error}")
        for path in files[:: max(1, len(files) // DECODED)]:
            try:
                ImageFile(path).load()
            except DataError as error:
                raise DataError(f"{error} (sample {paths[path]!r})") from error


def _header_error(path: Path) -> str | None:
    """What is wrong with an image file's header, read without decoding the pixels."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path):
            return None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error)

"""`Settings`: the base of every configuration model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo


class Settings(BaseModel):
    """A frozen pydantic model that refuses unknown fields.

    Subclass it as the `Config` of a component: every field with a description, a default and bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def resolve_path(value: str | Path, info: ValidationInfo) -> Path:
    """An absolute path; a relative one is relative to the file that holds it (validation context `folder`)."""
    path = Path(value).expanduser()
    folder = (info.context or {}).get("folder")
    return path if path.is_absolute() else (Path(folder) if folder else Path.cwd()) / path


def _resolve_source(value: str, info: ValidationInfo) -> str:
    if value.startswith((".", "/", "~")):
        return str(resolve_path(value, info).resolve())
    folder = resolve_path(value, info)
    return str(folder.resolve()) if folder.is_dir() else value


FilePath = Annotated[Path, AfterValidator(lambda value, info: resolve_path(value, info))]
"""A path in a configuration, made absolute against the file that holds it."""

Source = Annotated[str, AfterValidator(_resolve_source)]
"""Where weights come from: a folder (it exists beside the file, or starts with `.`, `/` or `~`), else a hub id."""

"""`Settings`: the base of every configuration model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator


class Settings(BaseModel):
    """A frozen pydantic model that refuses unknown fields.

    Subclass it as the `Config` of a component: every field with a description, a default and bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take `lr: true` for 1."""
        values = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(item, bool) for item in values):
            assert info.field_name is not None
            types = _types_in(cls.model_fields[info.field_name].annotation)
            if types & {int, float} and not types & {bool, Any}:
                raise ValueError(f"wanted a number, given {value!r}")
        return value


def _types_in(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation}.union(*map(_types_in, get_args(annotation)))


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

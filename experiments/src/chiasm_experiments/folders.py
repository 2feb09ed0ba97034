"""The files and folders that users name: whether they are what a command works on, told before any long work."""

from __future__ import annotations

import tempfile
from pathlib import Path

from chiasm.errors import CheckpointError, ConfigError
from chiasm.yamlfile import load_yaml
from chiasm_experiments.training.files import MANIFEST, RUN, has_parts, read_json
from chiasm_experiments.training.shared import stage_folder


def new_folder(path: Path) -> Path:
    """A folder for results, made where it is missing, as an absolute path.

    Raises:
        ConfigError: it cannot be made, or nothing can be written into it.
    """
    folder = path.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"nothing can be written into {str(folder)!r}: {error.strerror or error}; choose another folder"
        ) from error
    return folder


def trained_run(folder: Path) -> Path:
    """The folder of a run that is trained to its end.

    Raises:
        CheckpointError: it holds no run, or one whose last stage is not finished.
    """
    if not (folder / RUN).is_file():
        trials = f"{folder / 'trials'!s}/NAME" if (folder / "trials").is_dir() else "STUDY_FOLDER/trials/NAME"
        raise CheckpointError(
            f"{str(folder)!r} holds no run; wanted a folder that `chiasm train` wrote, or a trial of a study ({trials})"
        )
    try:
        last = read_json(folder / RUN)["stages"][-1]["name"]
    except (LookupError, TypeError) as error:
        raise CheckpointError(f"{str(folder / RUN)!r} is no run's configuration; train the run again") from error
    if not has_parts(stage_folder(folder / "stages" / last)):
        status = read_json(folder / MANIFEST)["status"] if (folder / MANIFEST).is_file() else "not started"
        raise CheckpointError(
            f"the run in {str(folder)!r} is not trained to its end ({status}); give the command that began it again"
        )
    return folder


def expect_run(file: Path) -> None:
    """Refuses a study where a run is wanted.

    Raises:
        ConfigError: the file holds a study, or is no YAML.
    """
    if _has(file, "factors"):
        raise ConfigError(f"{file} is a study; `chiasm sweep` runs it, and its `base` is the run")


def expect_study(file: Path) -> None:
    """Refuses a run where a study is wanted.

    Raises:
        ConfigError: the file holds a run, or is no YAML.
    """
    if not _has(file, "factors") and _has(file, "stages"):
        raise ConfigError(f"{file} is a run; `chiasm train` runs it. A study has `base: {file.name}` and `factors`")


def _has(file: Path, field: str) -> bool:
    data = load_yaml(file.absolute()).data
    return isinstance(data, dict) and field in data

"""What a submitted study sends to its cluster: one folder without what git ignores, results and weights.

The upload is looked at before it is sent: everything that the study names by a relative path must be in it, since a
job sees nothing else of this machine.
"""

from __future__ import annotations

import copy
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.config import RunConfig, include_data
from chiasm.errors import ConfigError
from chiasm.yamlfile import Document, load_yaml
from chiasm_experiments.study.config import Study, is_study
from chiasm_experiments.study.maker import Maker, fidelities
from chiasm_experiments.study.space import Chosen

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

LEFT_OUT = (
    *(".git/", ".venv/", "venv/", "node_modules/", "__pycache__/", ".*_cache/", "*.egg-info/", "runs/"),
    *("checkpoint-*/", "*.safetensors", "*.gguf", "*.pt", "*.pth", "*.ckpt", "*.npy", "*.parquet"),
)
"""Patterns of .gitignore's form for what is never sent: environments, results, weights, features."""
RESULTS = ("study.json", "run.json", "identity.json")
"""A folder with one of these holds results of a study or a run, or kept features, whatever it is called."""
IGNORE_FILES = (".gitignore", ".rayignore")
MOST_FILES = 20_000
"""A folder with more is taken for the wrong one."""
NAMED = 5
"""Of the largest files, in messages."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Upload:
    """The files of a folder that go to a cluster.

    Args:
        root: absolute.
        files: by path from the root, and their bytes.
    """

    root: Path
    files: Mapping[str, int]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(self.files.values())

    def pack(self, path: Path) -> None:
        """Writes a zip of them; equal content gives equal bytes, so that Ray sends it once."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(self.files):
                info = zipfile.ZipInfo(name)
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = (0o755 if os.access(self.root / name, os.X_OK) else 0o644) << 16
                archive.writestr(info, (self.root / name).read_bytes())


def collect(root: Path, limit: int) -> Upload:
    """The files of a folder that would be sent.

    Left out are `LEFT_OUT`, folders of `RESULTS`, what a .gitignore or .rayignore in the folder, below it, or above it
    up to the repository's root names, and what stands behind a link to a folder.

    Args:
        root: absolute.
        limit: of all files, in bytes.

    Raises:
        ConfigError: they are more, or too many; names the largest.
    """
    files: dict[str, int] = {}
    for name in _walk(root, [*_ignored_above(root), _Ignored.of(root, LEFT_OUT)]):
        files[name] = (root / name).stat().st_size
        if len(files) > MOST_FILES:
            break
    upload = Upload(root, files)
    if upload.size > limit or len(files) > MOST_FILES:
        largest = sorted(files.items(), key=lambda item: -item[1])[:NAMED]
        told = "".join(f"\n  {size / MIB:8.1f} MiB  {name}" for name, size in largest)
        many = f"more than {MOST_FILES} files" if len(files) > MOST_FILES else f"{len(files)} files"
        raise ConfigError(
            f"{str(root)!r} holds {many} of {upload.size / MIB:.1f} MiB to send, at most {limit / MIB:.0f} MiB are "
            f"sent. The largest:{told}\n"
            "Name data and weights by absolute paths in a folder that all nodes share, and keep these files out by a "
            "line in .rayignore; or give another folder with --working-dir"
        )
    return upload


@dataclass(frozen=True)
class Sources:
    """The YAML files of a study, and what each is to it."""

    name: str
    """Of the study."""
    file: Path
    """The study's own, absolute, with no link in it."""
    files: dict[Path, str]

    @property
    def folder(self) -> Path:
        """The smallest that holds them all."""
        return Path(os.path.commonpath([file.parent for file in self.files]))


def sources(path: Path) -> Sources:
    """The files that a study is written in.

    Raises:
        ConfigError: one is missing or wrong.
    """
    path = path.resolve()
    if not is_study(load_yaml(path)):
        raise ConfigError(f"{str(path)!r} has no `factors`, so it is no study; `chiasm submit` takes a study")
    study = Study(path)
    found = {path: "the study"}
    if isinstance(study.config.base, str):
        found[(path.parent / Path(study.config.base).expanduser()).resolve()] = "its base run"
    for file, _ in _base(study).lines.values():
        found.setdefault(file.resolve(), "a list of data")
    return Sources(study.config.name, path, found)


def require(upload: Upload, sources: Sources) -> None:
    """Looks for a study's files in an upload.

    Raises:
        ConfigError: one is not in it.
    """
    for file, what in sources.files.items():
        if not file.is_relative_to(upload.root):
            raise ConfigError(
                f"{what}, {str(file)!r}, is outside of {str(upload.root)!r}, the folder that is sent; give a folder "
                "that holds both with --working-dir"
            )
        if str(file.relative_to(upload.root)) not in upload.files:
            raise _unsent(what, file)


def rehearse(upload: Upload, sources: Sources, packed: Path, folder: Path) -> None:
    """Reads a study from its unpacked upload, as the job will, and looks for all that it names by a relative path.

    Args:
        upload: what is sent.
        sources: of the study.
        packed: the zip of it.
        folder: empty; where it is unpacked.

    Raises:
        ConfigError: something is not there.
    """
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(folder)
    here, there = _runs(Study(sources.file)), _runs(Study(folder / sources.file.relative_to(upload.root)))
    errors = [run for run in here.values() if isinstance(run, ConfigError)]
    if len(errors) == len(here):
        raise errors[0]
    for key, run in here.items():
        if isinstance(run, ConfigError):  # no run without other levels; the job will say if there is none at all
            continue
        sent = there[key]
        if isinstance(sent, ConfigError):
            raise ConfigError(
                f"as it is sent the study cannot be read: {str(sent).replace(str(folder), str(upload.root))}"
            )
        for name, (path, moved) in _relative(run, sent).items():
            if path.exists() and moved.exists() and moved.is_relative_to(folder):
                continue
            if path.exists() and path.is_relative_to(upload.root):
                raise _unsent(name, path)
            why = f"is outside of {str(upload.root)!r}, which is sent" if path.exists() else "does not exist"
            raise ConfigError(
                f"{name}: {str(path)!r} {why}; name by an absolute path what stands in a folder that all nodes share"
            )


def _runs(study: Study) -> dict[tuple[str, ...], RunConfig | ConfigError]:
    """The base run at each fidelity, and with each level by itself, or why there is no such run."""
    found: dict[tuple[str, ...], RunConfig | ConfigError] = {}
    changes: list[Chosen] = [{}]
    changes += [{path: label} for path, levels in study.config.varied.items() for label in levels]
    for fidelity in fidelities(study):
        maker = Maker(study, fidelity)
        for chosen in changes:
            try:
                run: RunConfig | ConfigError = maker.run(chosen)
            except ConfigError as error:
                run = error
            found[fidelity, *chosen, *map(str, chosen.values())] = run
    return found


def _base(study: Study) -> Document:
    """The base run with the data lists that it includes."""
    document = Document(copy.deepcopy(study.base.data), dict(study.base.lines), study.base.path)
    include_data(document)
    return document


def _unsent(what: str, path: Path) -> ConfigError:
    return ConfigError(
        f"{what}: {str(path)!r} is not sent: an ignore file names it, or it is of a kind that stays here "
        f"({', '.join(LEFT_OUT)}; folders of results; links to folders). Put it into a folder that all nodes share and "
        "name it by its absolute path"
    )


def _relative(here: RunConfig, there: RunConfig) -> dict[str, tuple[Path, Path]]:
    """The fields of a run whose paths depend on where it stands, and where they lead for two places of it."""
    values = [dict(_leaves(run.model_dump(mode="json"))) for run in (here, there)]
    pairs = {name: (value, values[1][name]) for name, value in values[0].items()}
    return {
        name: (Path(os.path.normpath(one)), Path(os.path.normpath(other)))
        for name, (one, other) in pairs.items()
        if one != other
    }


def _leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{at}.{key}" if at else str(key))
    else:
        yield at, value


@dataclass(frozen=True, slots=True)
class _Ignored:
    """The patterns of one folder."""

    folder: Path
    spec: GitIgnoreSpec

    @classmethod
    def of(cls, folder: Path, lines: Iterable[str]) -> _Ignored:
        from pathspec import GitIgnoreSpec

        return cls(folder, GitIgnoreSpec.from_lines(lines))

    def says(self, path: Path, *, is_folder: bool) -> bool | None:
        """Whether it leaves a path out; None: it says nothing of it."""
        return self.spec.check_file(f"{path.relative_to(self.folder).as_posix()}{'/' * is_folder}").include


def _walk(folder: Path, above: list[_Ignored], root: Path | None = None) -> Iterator[str]:
    """Paths of files from the root. The innermost pattern that says something of a path counts, as with git."""
    root = root or folder
    rules = above + _ignored_by(folder)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = folder / entry.name
        is_folder = entry.is_dir()
        says = (rule.says(path, is_folder=is_folder) for rule in reversed(rules))
        if next((said for said in says if said is not None), False):
            continue
        if not is_folder:
            if entry.is_file():
                yield path.relative_to(root).as_posix()
        elif not entry.is_symlink() and not any((path / name).is_file() for name in RESULTS):
            yield from _walk(path, rules, root)


def _ignored_by(folder: Path) -> list[_Ignored]:
    files = (folder / name for name in IGNORE_FILES)
    return [_Ignored.of(folder, file.read_text(encoding="utf-8").splitlines()) for file in files if file.is_file()]


def _ignored_above(folder: Path) -> list[_Ignored]:
    """The rules of the folders between a repository's root and a folder in it, outermost first."""
    above: list[_Ignored] = []
    for parent in (folder, *folder.parents):
        if parent != folder:
            above = _ignored_by(parent) + above
        if (parent / ".git").exists():
            return above
    return []

"""`chiasm new`: a package of one's own, filled in from a template, whose contract passes as it is."""

from __future__ import annotations

import importlib.util
import re
from importlib.resources import files
from pathlib import Path
from string import Template

from chiasm.errors import PluginError
from chiasm.registry import registry

NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")

_CONTRACTS = {
    "encoder": "EncoderContract",
    "fusion": "FusionContract",
    "adapter": "AdapterContract",
    "llm": "LanguageModelContract",
}

_SUFFIXES = {"encoder": "Encoder", "fusion": "Fusion", "adapter": "Adapter", "llm": "LM"}

_SUMMARIES = {
    "encoder": "patches through one convolution, then blocks of depthwise and pointwise ones",
    "fusion": "a learned weighted sum of each encoder's projection",
    "adapter": "a normalisation and two matrices for each token",
    "llm": "a small GPT over bytes",
}

_USAGES = {
    "encoder": "vision:\n  encoders: [{name: ${name}}]",
    "fusion": "vision:\n  fusion: {name: ${name}}",
    "adapter": "vision:\n  adapter: {name: ${name}}",
    "llm": "llm: {name: ${name}}",
}

KINDS = tuple(_CONTRACTS)
"""Kinds that there is a template for."""


def new_package(kind: str, name: str, folder: Path) -> list[Path]:
    """Writes a package with one component of a kind.

    Args:
        kind: one of `KINDS`.
        name: of the component, as runs will call it.
        folder: the package's, which must not exist.

    Returns:
        The files, relative to the folder.

    Raises:
        PluginError: no template for the kind; the name is malformed or taken; the folder exists.
    """
    if kind not in KINDS:
        raise PluginError(f"no template for the kind {kind!r}. Kinds: {', '.join(KINDS)}")
    if not NAME.fullmatch(name):
        raise PluginError(
            f"the name {name!r} is no plugin's; wanted lower-case words with hyphens between them, say 'my-{kind}'"
        )
    if name in registry().names(kind):
        owners = registry().duplicates().get((kind, name)) or [registry().get(kind, name).owner]
        raise PluginError(f"{kind} {name!r} is offered by {' and '.join(owners)} already; choose another name")
    package = f"chiasm_{name.replace('-', '_')}"
    if importlib.util.find_spec(package) is not None:
        raise PluginError(f"the name {name!r} would make a package {package!r}, which is installed; choose another")
    if folder.exists():
        raise PluginError(f"{str(folder)!r} exists; nothing was written. Remove it, or name another folder with --out")
    fields = {
        "kind": kind,
        "name": name,
        "package": package,
        "distribution": package.replace("_", "-"),
        "class_name": _class_name(kind, name),
        "contract": _CONTRACTS[kind],
        "summary": _SUMMARIES[kind],
        "usage": Template(_USAGES[kind]).substitute(name=name),
    }
    source = Path("src", package)
    templates = {
        Path("pyproject.toml"): "package/pyproject.toml",
        Path("README.md"): "package/README.md",
        source / "__init__.py": "package/__init__.py",
        source / "plugin.py": "package/plugin.py",
        source / "model.py": f"{kind}/model.py",
        Path("tests", "test_contract.py"): "package/test_contract.py",
    }
    for path, template in templates.items():
        text = files("chiasm").joinpath("templates", f"{template}.template").read_text(encoding="utf-8")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(Template(text).substitute(fields), encoding="utf-8")
    (folder / source / "py.typed").touch()
    return [*templates, source / "py.typed"]


def _class_name(kind: str, name: str) -> str:
    """`my-encoder` and `my` to MyEncoder: with its kind, as a name such as `block` would hide another."""
    words, suffix = "".join(word.capitalize() for word in re.split("[-_]", name)), _SUFFIXES[kind]
    return words if words.endswith(suffix) and words != suffix else words + suffix

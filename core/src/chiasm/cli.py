"""The `chiasm` command line: what the core itself can do, and the commands that plugins add."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from chiasm.errors import ChiasmError
from chiasm.registry import registry


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="chiasm")
def cli() -> None:
    """Settles how to build a vision-language model.

    \b
    chiasm plugins                 what is installed
    chiasm new encoder NAME        a package of your own, to be changed
    chiasm check encoder NAME      does a component keep its contract?
    chiasm plan STUDY.yaml         what would run, and what cannot
    chiasm train RUN.yaml --out F  one run, here
    chiasm sweep STUDY.yaml        run it and write the report
    chiasm ask RUN IMAGE QUESTION  talk to a trained run
    """


@cli.command()
@click.argument("kind", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine.")
def plugins(kind: str | None, as_json: bool) -> None:
    """List installed components, without importing them.

    KIND (encoder, fusion, adapter, llm, dataset, benchmark, or what a plugin adds) lists that kind alone. Exits with 1
    if a plugin is broken or two plugins offer the same name.
    """
    found = registry()
    if kind is not None:
        found.names(kind)  # an unknown kind is told
    items = [item for item in found.all() if kind in (None, item.component.kind)]
    duplicates = {f"{kind} {name}": owners for (kind, name), owners in found.duplicates().items()}
    if as_json:
        components = [
            {
                "kind": item.component.kind,
                "name": item.component.name,
                "owner": item.owner,
                "summary": item.component.summary,
            }
            for item in items
        ]
        click.echo(json.dumps({"components": components, "broken": found.broken, "duplicates": duplicates}, indent=2))
    else:
        width = max((len(item.component.name) for item in items), default=0)
        for name, record in found.kinds.items():
            rows = [item for item in items if item.component.kind == name]
            if rows:
                click.echo(f"{name}: {record.summary}")
            for item in rows:
                click.echo(f"  {item.component.name:{width}}  {item.component.summary}  [{item.owner}]")
        for owner, error in found.broken.items():
            click.echo(f"BROKEN {owner}: {error}", err=True)
        for name, owners in duplicates.items():
            click.echo(f"DUPLICATE {name}: offered by {' and '.join(owners)}", err=True)
    if found.broken or duplicates:
        raise SystemExit(1)


@cli.command()
@click.argument("kind")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine.")
def check(kind: str, name: str, as_json: bool) -> None:
    """Check that a component keeps the contract of its kind.

    Runs every check of KIND on a tiny instance with random weights; nothing is downloaded. Exits with 1 if one fails,
    and says what to mend.

    \b
    chiasm check encoder my-encoder
    """
    cls = registry().load(kind, name)
    from chiasm.testing import run_checks

    results = run_checks(kind, cls)
    if as_json:
        rows = [{"check": r.name, "passed": r.passed, "message": r.message, "seconds": r.seconds} for r in results]
        click.echo(json.dumps({"kind": kind, "name": name, "checks": rows}, indent=2))
    else:
        for result in results:
            click.echo(f"{'ok  ' if result.passed else 'FAIL'} {result.name}")
            if not result.passed:
                click.echo("     " + result.message.replace("\n", "\n     "))
        failed = sum(not result.passed for result in results)
        click.echo(f"{kind} {name}: {len(results) - failed} of {len(results)} checks passed")
    if not all(result.passed for result in results):
        raise SystemExit(1)


@cli.command()
@click.argument("kind")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="The package's folder; NAME here, if left out.")
def new(kind: str, name: str, out: Path | None) -> None:
    """Write a package with a component of your own.

    It holds a small component of a KIND (encoder, fusion, adapter, llm) that runs will call NAME. It keeps its contract
    as it is written; change it from there.
    """
    from chiasm.scaffold import new_package

    folder = Path(name) if out is None else out
    for file in new_package(kind, name, folder):
        click.echo(folder / file)
    click.echo(f"\npip install -e {folder} && chiasm check {kind} {name}")


def main(prefix: Sequence[str] = ()) -> None:
    """Runs the command line; a user's error is printed without a traceback.

    Args:
        prefix: words to put before the arguments of the process, say the name of a command.
    """
    registry().add_commands(cli)
    try:
        cli.main([*prefix, *sys.argv[1:]], prog_name="chiasm", standalone_mode=True)
    except ChiasmError as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", []))
        click.echo(f"error: {error}{notes}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

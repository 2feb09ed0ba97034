"""`chiasm submit`: a study as a job of a Ray cluster, from any folder of the user's own."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chiasm.errors import ChiasmError, ConfigError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from chiasm_experiments.upload import Sources, Upload

FORWARDED = ("CHIASM_RUNS", "CHIASM_CACHE")
"""Variables of this shell that the job gets: folders that all nodes share."""
STOP_SECONDS = 300
"""What a job that is stopped has to write its checkpoints; Ray's own default is 3."""
API_SERVER, AUTH_MODE, AUTH_TOKENS = (
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_MODE",
    ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"),
)
TOKEN_FILE = Path(".ray") / "auth_token"
"""Below the user's home; Ray makes it when it first runs on a machine."""
NOT_FOUND = 127
"""A shell's exit status where there is no such command."""


class SubmissionError(ChiasmError):
    """The cluster cannot be reached, or does not take the job."""


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("study", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("sweep_options", nargs=-1, type=click.UNPROCESSED)
@click.option("--address", help="Of the cluster's dashboard, say http://HOST:8265. Default: as Ray finds it.")
@click.option(
    "--working-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The folder that is sent. Default: the smallest that holds the study and its base run.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results, which all nodes share.")
@click.option("--follow/--no-follow", default=True, help="Show what the job prints until it ends.  [default: follow]")
@click.option("--env", multiple=True, metavar="NAME[=VALUE]", help="A variable for the job and its workers.")
@click.option("--limit", type=click.IntRange(1, 100), default=50, show_default=True, help="MiB of what is sent.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine; what the job prints goes to stderr.")
def submit(
    study: Path,
    sweep_options: tuple[str, ...],
    address: str | None,
    working_dir: Path | None,
    out: Path | None,
    follow: bool,
    env: tuple[str, ...],
    limit: int,
    as_json: bool,
) -> None:
    """Run a STUDY file on a Ray cluster: `chiasm sweep` there, with the folder that holds the study.

    Every option of `chiasm sweep` may be given too. Sent is what git would not ignore of the folder, without results
    and weights; Chiasm and its plugins are installed on the nodes, and data that the study names by absolute paths is
    in a folder that they share. CHIASM_RUNS and CHIASM_CACHE go along. Exits with 1 if the job failed.
    """
    words = _sweep_words(study, sweep_options, out)
    variables = _variables(env, os.environ)
    from chiasm_experiments.upload import collect, rehearse, require, sources

    found = sources(study)
    upload = collect(working_dir.resolve() if working_dir is not None else found.folder, limit * 2**20)
    require(upload, found)
    with tempfile.TemporaryDirectory(prefix="chiasm-submit-") as folder:
        packed = Path(folder) / "study.zip"
        upload.pack(packed)
        rehearse(upload, found, packed, Path(folder) / "unpacked")
        client = connect(address)
        job = _send(client, found, upload, packed, words, variables)
    told = {"job": job, "address": client.get_address()}
    click.echo(f"job {job} at {told['address']}", err=as_json)
    if follow:
        status = _follow(client, job, to_stderr=as_json)
    else:
        click.echo(f"its output: {_ray(client, 'logs --follow', job)}", err=as_json)
        status = client.get_job_status(job).value
    if as_json:
        click.echo(json.dumps(told | {"status": status}))
    if follow and status != "SUCCEEDED":
        raise SystemExit(1)


def connect(address: str | None) -> JobSubmissionClient:
    """A client of a cluster's job server.

    Args:
        address: of its dashboard, with or without `http://`; None: what RAY_API_SERVER_ADDRESS or RAY_ADDRESS names,
            else a cluster on this machine.

    Raises:
        SubmissionError: there is none, or it does not let us in.
    """
    if address is not None:
        # Ray takes this variable, and RAY_ADDRESS, for more than the address that it is given
        os.environ[API_SERVER] = address if "://" in address else f"http://{address}"
    if AUTH_MODE not in os.environ and _has_token():
        # as `ray start` and `ray.init` take it; Ray's client of jobs would send no token without this
        os.environ[AUTH_MODE] = "token"
    headers = json.loads(os.environ.get("RAY_JOB_HEADERS", "{}"))

    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    where = os.environ.get(API_SERVER) or os.environ.get("RAY_ADDRESS") or "this machine"
    try:
        return JobSubmissionClient(headers=headers)
    except AuthenticationError as error:
        said = " ".join(str(error).split())
        raise SubmissionError(
            f"the cluster at {where} asks for a token and did not take ours. Its token is on its head node "
            f"(`ray get-auth-token`): put it into RAY_AUTH_TOKEN, or into ~/{TOKEN_FILE}. {AUTH_MODE} is "
            f"{os.environ.get(AUTH_MODE, 'not set')!r} here. Ray says: {said}"
        ) from None
    except (ConnectionError, requests.exceptions.RequestException, ValueError, RuntimeError) as error:
        raise SubmissionError(
            f"no Ray cluster answers at {where} ({' '.join(str(error).split())}). Start one with `ray start --head`, "
            "or give the address of its dashboard, `--address http://HOST:8265`; to one behind a firewall "
            "`ssh -L 8265:localhost:8265 HOST` opens a way"
        ) from None


def _send(
    client: JobSubmissionClient, study: Sources, upload: Upload, packed: Path, words: Sequence[str], env: dict[str, str]
) -> str:
    """Submits a packed study; the job's id."""
    command = ["chiasm", "sweep", str(study.file.relative_to(upload.root)), *words]
    size = packed.stat().st_size / 2**20
    click.echo(f"sending {len(upload.files)} files of {upload.root} ({size:.1f} MiB)", err=True)
    try:
        job: str = client.submit_job(
            entrypoint=shlex.join(command),
            submission_id=f"chiasm-{study.name}-{secrets.token_hex(4)}",
            runtime_env={"working_dir": str(packed), "env_vars": env},
            metadata={"study": study.name},
        )
    except (ConnectionError, RuntimeError) as error:
        raise SubmissionError(f"the cluster did not take the job: {error}") from None
    return job


def _follow(client: JobSubmissionClient, job: str, *, to_stderr: bool) -> str:
    """Prints what a job prints until it ends; how it ended."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            click.echo(lines, nl=False, err=to_stderr)

    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        ways = (_ray(client, way, job) for way in ("logs --follow", "stop"))
        click.echo("\nthe job goes on; see it with `{}`, end it with `{}`".format(*ways), err=True)
        raise SystemExit(130) from None
    except (RuntimeError, OSError) as error:
        raise SubmissionError(
            f"the connection broke ({error}), the job may go on: `{_ray(client, 'status', job)}`"
        ) from None
    info = client.get_job_info(job)
    if info.driver_exit_code == NOT_FOUND:
        raise SubmissionError(
            "the head node finds no `chiasm`: install it there, and have its folder on the PATH of the shell that "
            "calls `ray start`"
        )
    if info.status != "SUCCEEDED" and info.message:
        click.echo(info.message.partition(", last available logs")[0], err=True)
    status: str = info.status.value
    return status


def _ray(client: JobSubmissionClient, action: str, job: str) -> str:
    """A command of Ray's own on a job, as this shell must give it."""
    token = f"{AUTH_MODE}=token " if os.environ.get(AUTH_MODE) == "token" else ""
    return f"{token}ray job {action} --address {client.get_address()} {job}"


def _sweep_words(study: Path, options: Sequence[str], out: Path | None) -> list[str]:
    """The options that `chiasm sweep` gets on the cluster, which it would take here too."""
    from chiasm_experiments.commands import sweep

    sweep.make_context("chiasm sweep", [str(study), *options]).close()  # click refuses what it does not know
    return [*options, *(("--out", os.path.abspath(out)) if out is not None else ())]


def _variables(given: Sequence[str], here: Mapping[str, str]) -> dict[str, str]:
    """The variables of the job.

    Raises:
        ConfigError: one that is named without a value is not set here.
    """
    found = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    for name in FORWARDED:
        if value := here.get(name):
            # the job's own folder is a temporary one
            found[name] = value if value.startswith("~") else os.path.abspath(value)
    for word in given:
        name, equals, value = word.partition("=")
        if not equals and name not in here:
            raise ConfigError(f"--env {name}: it is not set here; set it, or write {name}=VALUE")
        found[name] = value if equals else here[name]
    return found


def _has_token() -> bool:
    return any(os.environ.get(name) for name in AUTH_TOKENS) or (Path.home() / TOKEN_FILE).is_file()

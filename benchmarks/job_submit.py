"""The README's commands for a cluster, to the letter: `ray job submit` with a token, and `chiasm submit`.

The first block of commands below "On a cluster" is run as it stands, by a shell that has a new home, this environment's
programs on its PATH, and nothing else. Then a study in a folder of its own goes to the same cluster by `chiasm submit`
from elsewhere, and once more with a wrong token. Every trial must be complete, with the scores of a direct run.

    python benchmarks/job_submit.py [--quick]

`--quick` puts a study of two trials in the place of the demo, to see that the script runs; it writes no result.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from common import ROOT, write_result

BIN = Path(sys.executable).parent
DEMO = "experiments/studies/demo.yaml"
PORTS = (6379, 8265)
"""That `ray start --head` takes."""


def commands() -> str:
    """The block of the README."""
    section = (ROOT / "README.md").read_text().partition("\n## On a cluster\n")[2]
    found = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert found, "the README has no block of commands below 'On a cluster'"
    return found[1]


def shell(text: str, env: dict[str, str], folder: Path) -> tuple[int, str, float]:
    """What a new shell prints, its status, and how long it takes."""
    started = time.monotonic()
    command = ["bash", "-euo", "pipefail", "-c", text]
    result = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=2400)
    return result.returncode, result.stdout + result.stderr, time.monotonic() - started


def end_cluster(folder: Path) -> None:
    """Kills the processes of the Ray whose temporary folder this is; `ray stop` would end every Ray of the machine."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue


def own_study(folder: Path, seeds: list[int], *large: str) -> Path:
    """The demo as a user would have it in a folder of their own, with files of 1 GiB beside it that must stay here."""
    folder.mkdir()
    study = yaml.safe_load((ROOT / DEMO).read_text()) | {"name": "mine", "base": "base.yaml", "seeds": seeds}
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    shutil.copy(ROOT / "experiments" / "recipes" / "demo.yaml", folder / "base.yaml")
    (folder / ".gitignore").write_text("data/\n")
    for name in large:
        (folder / name).parent.mkdir(exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(2**30)
    return folder / "study.yaml"


def scores(folder: Path) -> dict[str, dict[str, float] | None]:
    """By trial; None where it is not complete."""
    manifests = [json.loads(file.read_text()) for file in sorted(folder.glob("trials/*/manifest.json"))]
    return {m["trial"]: m["scores"] if m["status"] == "complete" else None for m in manifests}


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise SystemExit(f"port {port}, which `ray start --head` takes, is in use")
    folder = Path(tempfile.mkdtemp(prefix="chiasm-job-", dir="/tmp"))  # short: Ray makes sockets below it
    home, temp = folder / "home", folder / "ray"
    home.mkdir()
    env = {"HOME": str(home), "PATH": f"{BIN}:/usr/bin:/bin", "RAY_TMPDIR": str(temp)}
    text = commands()
    if quick:
        study = own_study(folder / "demo", [0])
        small = yaml.safe_load(study.read_text())
        small["factors"] = {"vision.adapter": ["linear", "mlp"]}
        study.write_text(yaml.safe_dump(small | {"name": "demo", "control": {}}))
        text = text.replace("--working-dir .", f"--working-dir {study.parent}")
        text = text.replace(f"python experiments/sweep.py {DEMO}", "chiasm sweep study.yaml")
    try:
        print(text, flush=True)
        status, output, submitted_s = shell(text, env, ROOT)
        print(output[-3000:], flush=True)
        assert status == 0, f"the commands of the README ended with {status}"
        submitted = scores(home / "chiasm-runs" / "demo")
        assert (home / "chiasm-runs" / "demo" / "report.html").is_file(), "no report was written"

        mine, elsewhere = own_study(folder / "mine", [0], "data/large.bin", "weights.safetensors"), folder / "elsewhere"
        elsewhere.mkdir()
        status, output, own_s = shell(f"chiasm submit {mine} --out ../results", env, elsewhere)
        print(output[-3000:], flush=True)
        assert status == 0, f"`chiasm submit` ended with {status}"
        sent = re.search(r"sending (\d+) files of .* \(([\d.]+) MiB\)", output)
        assert sent, "it did not say what it sent"
        refused, output, _ = shell(f"RAY_AUTH_TOKEN={'0' * 64} chiasm submit {mine}", env, elsewhere)
        told = "asks for a token and did not take ours" in output
        _, watched, _ = shell("chiasm watch ../results --once", env, elsewhere)
        print(watched, flush=True)
    finally:
        end_cluster(temp)
    own = scores(folder / "results")

    direct_env = {**env, "RAY_AUTH_MODE": "disabled", "CHIASM_RUNS": str(folder / "direct")}
    direct_study = folder / "demo" / "study.yaml" if quick else ROOT / DEMO
    status, output, direct_s = shell(f"chiasm sweep {direct_study}", direct_env, ROOT)
    assert status == 0, output[-3000:]
    direct = scores(folder / "direct" / "demo")
    shutil.rmtree(folder)
    same = submitted == direct and {*map(str, own.values())} <= {*map(str, direct.values())}
    complete = None not in submitted.values() and None not in own.values()
    if quick:
        print(f"same scores: {same}; complete: {complete}; the wrong token is told: {told and refused == 2}")
        return
    write_result(
        "job_submit",
        figures={
            "commands": text.splitlines(),
            "trials_complete": sum(value is not None for value in submitted.values()),
            "trials": len(submitted),
            "submitted_s": submitted_s,
            "direct_s": direct_s,
            "same_scores_as_direct": same,
            "chiasm submit": {
                "trials_complete": sum(value is not None for value in own.values()),
                "trials": len(own),
                "seconds": own_s,
                "files_sent": int(sent[1]),
                "mib_sent": float(sent[2]),
                "mib_in_the_folder": 2048,
                "wrong_token_is_told": told and refused == 2,
            },
        },
        ratio=submitted_s / direct_s,
        asked="the README's commands work from a shell that knows nothing else: every trial complete, with the scores "
        "of a direct run; `chiasm submit` likewise from another folder",
        met=complete and same and told and len(submitted) == 18 and len(own) == 6,
    )


if __name__ == "__main__":
    main()

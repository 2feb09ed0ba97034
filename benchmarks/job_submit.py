"""`ray job submit --working-dir . -- python experiments/sweep.py STUDY` against a local cluster with a token.

Starts a head node, submits the study as a shell would, waits for it, and checks that every trial is complete and the
report is written. The measured figure is the wall time of the submitted job beside that of `chiasm sweep` run directly.

    python benchmarks/job_submit.py [STUDY]
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, write_result

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(command: list[str], env: dict[str, str]) -> str:
    print("$", " ".join(command), flush=True)
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    if result.returncode:
        raise SystemExit(
            f"{command[:4]} exited with {result.returncode}:\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
        )
    return result.stdout


def main() -> None:
    study = sys.argv[1] if len(sys.argv) > 1 else "experiments/studies/demo.yaml"
    with tempfile.TemporaryDirectory(prefix="chiasm-job-") as folder:
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32))
        dashboard, gcs = free_port(), free_port()
        env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "CHIASM_RUNS": f"{folder}/submitted",
        }
        env.pop("RAY_ADDRESS", None)
        temp = f"--temp-dir={folder}/ray"
        run([RAY, "start", "--head", "--num-cpus=2", f"--port={gcs}", f"--dashboard-port={dashboard}", temp], env)
        try:
            address = {**env, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
            started = time.monotonic()
            submit = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "experiments/sweep.py", study]
            output = run(submit, address)
            submitted_s = time.monotonic() - started
        finally:
            run([RAY, "stop", "--force"], env)
        print(output[-1500:])
        (found,) = Path(f"{folder}/submitted").iterdir()
        submitted = statuses(found)
        assert (found / "report.html").is_file(), "no report was written"

        started = time.monotonic()
        run([sys.executable, "-m", "chiasm.cli", "sweep", study], {**env, "CHIASM_RUNS": f"{folder}/direct"})
        direct_s = time.monotonic() - started
        (direct,) = Path(f"{folder}/direct").iterdir()
        same = scores(found) == scores(direct)
    write_result(
        "job_submit",
        figures={
            "study": study,
            "trials_complete": submitted.count("complete"),
            "trials": len(submitted),
            "submitted_s": submitted_s,
            "direct_s": direct_s,
            "same_scores_as_direct": same,
        },
        ratio=submitted_s / direct_s,
        asked="the study runs to its end as a submitted job, with the scores of a direct run",
        met=submitted.count("complete") == len(submitted) and same,
    )


def manifests(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("trials/*/manifest.json"))]


def statuses(folder: Path) -> list[str]:
    return [manifest["status"] for manifest in manifests(folder)]


def scores(folder: Path) -> dict[str, dict]:
    return {manifest["trial"]: manifest["scores"] for manifest in manifests(folder)}


if __name__ == "__main__":
    main()

"""`chiasm submit`: what is sent, what is refused before that, and what a job server that speaks Ray's API gets."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import yaml
from aiohttp import web
from click.testing import CliRunner

from chiasm.errors import ConfigError
from chiasm_experiments.submit import SubmissionError, submit
from chiasm_experiments.upload import collect, rehearse, require, sources

pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # Ray's client asks aiohttp so
MIB = 2**20
RUN = {
    "vision": {"encoders": ["blind"], "adapter": "mlp"},
    "llm": {"name": "causal", "shape": {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32}},
    "stages": [{"name": "s", "data": "../data.yaml", "train": ["adapter"], "lr": 1e-3, "batch_size": 2}],
}
STUDY = {"name": "tiny", "base": "../recipes/run.yaml", "factors": {"vision.adapter": ["mlp", "linear"]}}


@pytest.fixture
def project(tmp_path):
    """A folder of a user's own with a study, its base run, a data list and what must stay here; outside, the data."""
    root = tmp_path / "project"
    files = {
        "studies/study.yaml": yaml.safe_dump(STUDY),
        "recipes/run.yaml": yaml.safe_dump(RUN),
        "data.yaml": yaml.safe_dump({"name": "world", "task": "captions", "size": 4}),
        "notes.txt": "a note",
        "secret.txt": "ignored by git",
        "kept/secret.txt": "not ignored here",
        "kept/.gitignore": "!secret.txt\n",
        "big.tmp": "ignored by Ray",
        ".gitignore": "secret.txt\nout*/\n",
        ".rayignore": "*.tmp\n",
        ".git/config": "x",
        "output/large": "x",
        "old/study.json": "{}",
        "old/trials/a/metrics.jsonl": "{}",
        "runs/x": "x",
        "weights/model.safetensors": "x",
        "deep/checkpoint-0001/part": "x",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def study(project):
    return project / "studies" / "study.yaml"


def change(path: Path, **values) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def test_what_is_sent_is_what_git_and_ray_would_take_without_results_and_weights(project):
    (project / "link").symlink_to(project / "weights")
    assert sorted(collect(project, MIB).files) == [
        ".gitignore",
        ".rayignore",
        "data.yaml",
        "kept/.gitignore",
        "kept/secret.txt",
        "notes.txt",
        "recipes/run.yaml",
        "studies/study.yaml",
    ]


def test_rules_above_the_folder_count_as_far_as_the_repository_reaches(project):
    (project / "kept" / "x.tmp").write_text("x")
    assert "x.tmp" not in collect(project / "kept", MIB).files
    (project.parent / ".gitignore").write_text("*.yaml\n")
    assert "studies/study.yaml" in collect(project, MIB).files


def test_equal_files_are_one_package_for_ray(project, tmp_path):
    for name in ("one", "two"):
        collect(project, MIB).pack(tmp_path / name)
        os.utime(project / "notes.txt", (1, 1))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert zipfile.ZipFile(tmp_path / "one").read("notes.txt") == b"a note"


def test_too_much_is_refused_with_the_largest_files(project):
    for name, size in (("a", 3 * MIB), ("b", MIB // 2), ("c", 4 * MIB)):
        (project / name).write_bytes(bytes(size))
    with pytest.raises(ConfigError, match=r"11 files of 7\.5 MiB .* at most 2 MiB") as refused:
        collect(project, 2 * MIB)
    told = str(refused.value)
    assert told.index("4.0 MiB  c") < told.index("3.0 MiB  a") < told.index("0.5 MiB  b")
    assert ".rayignore" in told


def test_the_smallest_folder_that_holds_the_study_and_what_it_includes(project, study):
    found = sources(study)
    assert found.folder == project
    assert sorted(found.files) == sorted([project / "data.yaml", project / "recipes" / "run.yaml", study])
    change(project / "recipes" / "run.yaml", stages=[RUN["stages"][0] | {"data": "world"}])
    change(study, base="../studies/base.yaml")
    (project / "recipes" / "run.yaml").rename(study.parent / "base.yaml")
    assert sources(study).folder == study.parent


@pytest.mark.parametrize(
    ("where", "says"),
    [("studies", r"its base run, .*run\.yaml', is outside of .*studies', .*--working-dir"), ("recipes", "the study, ")],
)
def test_a_base_run_outside_of_the_folder_is_refused(project, study, where, says):
    with pytest.raises(ConfigError, match=says):
        require(collect(project / where, MIB), sources(study))


def test_a_study_that_an_ignore_file_names_is_refused(project, study):
    (project / ".rayignore").write_text("run.yaml\n")
    with pytest.raises(ConfigError, match=r"its base run: .*run\.yaml' is not sent: an ignore file names it"):
        require(collect(project, MIB), sources(study))


def check(project, study, tmp_path):
    tmp_path.mkdir(exist_ok=True)
    upload, found = collect(project, MIB), sources(study)
    require(upload, found)
    upload.pack(tmp_path / "x.zip")
    rehearse(upload, found, tmp_path / "x.zip", tmp_path / "there")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"file": "samples.json"}, None),
        ({"file": "/shared/samples.json", "images": "/shared/images"}, None),
        ({"file": "gone.json"}, r"stages\.0\.data\.0\.file: '.*gone\.json' does not exist; name by an absolute path"),
        ({"file": "../far.json"}, r"file: '.*far\.json' is outside of '.*project'"),
        ({"file": "samples.json", "images": "output"}, r"images: '.*output' is not sent: "),
    ],
)
def test_what_a_study_names_by_a_relative_path_must_be_sent(project, study, tmp_path, data, says):
    for file in (project / "samples.json", tmp_path / "far.json"):
        file.write_text("[]")
    (project / "data.yaml").write_text(yaml.safe_dump({"name": "llava"} | data))
    if says is None:
        check(project, study, tmp_path)
    else:
        with pytest.raises(ConfigError, match=says):
            check(project, study, tmp_path)


def test_what_levels_and_fidelities_name_must_be_sent_too(project, study, tmp_path):
    (project / "output" / "list.yaml").write_text("world")
    levels = {"stages.s.data": {"given": "../data.yaml", "ignored": "../output/list.yaml"}}
    change(study, factors=levels)
    with pytest.raises(
        ConfigError, match=r"as it is sent the study cannot be read: .*project/studies/\.\./output/list"
    ):
        check(project, study, tmp_path / "a")
    fields = {"stages.s.data": {"name": "llava", "file": "few.json"}}
    change(study, factors=STUDY["factors"], fidelities={"small": fields, "full": {}})
    with pytest.raises(ConfigError, match=r"stages\.0\.data\.0\.file: '.*studies/few\.json' does not exist"):
        check(project, study, tmp_path / "b")
    change(study, fidelities={}, factors={"vision.adaptor": ["mlp"]})
    change(project / "recipes" / "run.yaml", llm="gone")
    with pytest.raises(ConfigError, match="no llm named 'gone'"):
        check(project, study, tmp_path / "c")


def test_weights_beside_the_study_are_not_sent(project, study, tmp_path):
    (project / "recipes" / "weights").mkdir()
    (project / "recipes" / "weights" / "model.safetensors").write_text("x")
    change(project / "recipes" / "run.yaml", llm={"name": "causal", "pretrained": "./weights"})
    with pytest.raises(ConfigError, match=r"llm\.pretrained: '.*weights' is not sent: .*absolute path"):
        check(project, study, tmp_path)


class JobServer:
    """As much of the API of Ray's dashboard as a submission uses, in a thread.

    Args:
        refuse: the status that it answers everything with.
    """

    def __init__(self, refuse: int | None = None) -> None:
        self.refuse = refuse
        self.packages: dict[str, bytes] = {}
        self.jobs: list[dict] = []
        self.headers: list[str | None] = []
        self.ended = {"status": "SUCCEEDED", "driver_exit_code": 0, "message": "done"}
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(ready,))
        self.thread.start()
        assert ready.wait(10)

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        app = web.Application(middlewares=[self._enter], client_max_size=100 * MIB)
        app.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/packages/gcs/{name}", self._has),
                web.put("/api/packages/gcs/{name}", self._take),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/{job}", self._info),
                web.get("/api/jobs/{job}/logs/tail", self._tail),
            ]
        )
        self.runner = web.AppRunner(app)
        self.loop.run_until_complete(self.runner.setup())
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.address = f"127.0.0.1:{self.runner.addresses[0][1]}"
        ready.set()
        self.loop.run_forever()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    @web.middleware
    async def _enter(self, request, handler):
        self.headers.append(request.headers.get("Authorization"))
        if self.refuse is not None:
            return web.Response(status=self.refuse, text="Unauthorized: Missing authentication token")
        return await handler(request)

    async def _version(self, request):
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"})

    async def _has(self, request):
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def _take(self, request):
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()

    async def _submit(self, request):
        self.jobs.append(await request.json())
        job = self.jobs[-1]["submission_id"]
        return web.json_response({"job_id": job, "submission_id": job})

    async def _info(self, request):
        job = self.jobs[-1]
        told = {"type": "SUBMISSION", "submission_id": request.match_info["job"], "entrypoint": job["entrypoint"]}
        return web.json_response(told | self.ended)

    async def _tail(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for line in ("2 trials to run\n", "done\n"):
            await socket.send_str(line)
        await socket.close()
        return socket


@pytest.fixture
def make_server(monkeypatch):
    made = []
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "CHIASM_RUNS", "CHIASM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # connect() sets it for Ray's client; set here, it is taken back
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")

    def make(**options) -> JobServer:
        made.append(JobServer(**options))
        return made[-1]

    yield make
    for server in made:
        server.close()


def call(*words):
    return CliRunner().invoke(submit, [str(word) for word in words])


def test_a_study_becomes_a_job(make_server, project, study, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # not the project's
    monkeypatch.setenv("CHIASM_RUNS", "shared/runs")
    monkeypatch.setenv("CHIASM_CACHE", "~/features")
    monkeypatch.setenv("WANDB_PROJECT", "vlm")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of another cluster: the option counts
    server = make_server()
    result = call(
        study, "--address", server.address, "--out", "out", "--fresh", "--env", "WANDB_PROJECT", "--env", "A=b=c"
    )
    assert result.exit_code == 0, result.output
    assert "2 trials to run\ndone\n" in result.output
    (job,) = server.jobs
    assert job["entrypoint"] == f"chiasm sweep studies/study.yaml --fresh --out {tmp_path}/out"
    assert job["submission_id"].startswith("chiasm-tiny-")
    assert job["metadata"] == {"study": "tiny"}
    assert job["runtime_env"]["env_vars"] == {
        "CHIASM_RUNS": f"{tmp_path}/shared/runs",
        "CHIASM_CACHE": "~/features",
        "WANDB_PROJECT": "vlm",
        "A": "b=c",
        "RAY_JOB_STOP_WAIT_TIME_S": "300",
    }
    ((name, content),) = server.packages.items()
    assert job["runtime_env"]["working_dir"] == f"gcs://{name}"
    sent = zipfile.ZipFile(io.BytesIO(content))
    assert set(sent.namelist()) == set(collect(project, MIB).files)
    assert sent.read("studies/study.yaml") == study.read_bytes()


def test_json_is_alone_on_stdout(make_server, study):
    server = make_server()
    for words, status in (((), "FAILED"), (("--no-follow",), "FAILED")):
        server.ended = {"status": "FAILED", "driver_exit_code": 1, "message": "exit code 1, last available logs: x"}
        result = call(study, "--address", f"http://{server.address}/", "--json", *words)
        told = json.loads(result.stdout)
        assert told == {
            "job": server.jobs[-1]["submission_id"],
            "address": f"http://{server.address}",
            "status": status,
        }
        assert result.exit_code == (0 if words else 1)
        assert ("2 trials to run" in result.stderr) == (not words)
        assert (f"ray job logs --follow --address http://{server.address} chiasm-tiny-" in result.stderr) == bool(words)


def test_a_node_without_chiasm_is_told(make_server, study):
    server = make_server()
    server.ended = {"status": "FAILED", "driver_exit_code": 127, "message": "x"}
    result = call(study, "--address", server.address)
    assert isinstance(result.exception, SubmissionError)
    assert "the head node finds no `chiasm`: install it there" in str(result.exception)


@pytest.mark.parametrize("status", [401, 403])
def test_a_cluster_that_wants_a_token_is_told(make_server, study, status):
    result = call(study, "--address", make_server(refuse=status).address)
    assert isinstance(result.exception, SubmissionError)
    told = str(result.exception)
    assert "asks for a token and did not take ours" in told
    assert "`ray get-auth-token`" in told
    assert "RAY_AUTH_MODE is 'disabled' here" in told


def test_a_token_that_is_there_is_sent_without_being_asked_for(make_server, tmp_path):
    server = make_server()
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_API_SERVER_ADDRESS")}
    # Ray reads what it is to do once in a process
    words = [sys.executable, "-c", "import sys; from chiasm_experiments.submit import connect; connect(sys.argv[1])"]
    env["RAY_AUTH_TOKEN_PATH"] = str(token)
    result = subprocess.run([*words, server.address], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert set(server.headers) == {f"Bearer {token.read_text()}"}


def test_no_cluster_is_told(make_server, study):
    server = make_server()
    server.close()
    server.close = lambda: None
    result = call(study, "--address", server.address)
    assert isinstance(result.exception, SubmissionError)
    told = str(result.exception)
    assert f"no Ray cluster answers at http://{server.address} (Failed to connect" in told
    assert "`ray start --head`" in told


def test_mistakes_are_told_before_a_cluster_is_looked_for(study, project):
    assert "does not exist" in call("gone.yaml").output
    assert "No such option" in call(study, "--frsh").output
    assert "NOT_SET: it is not set here" in str(call(study, "--env", "NOT_SET").exception)
    assert "no `factors`, so it is no study" in str(call(project / "recipes" / "run.yaml").exception)

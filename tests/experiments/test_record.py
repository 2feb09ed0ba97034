"""The record of a study: where it lies, who holds its trials, and that a kill at any moment leaves it readable."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import optuna
import pytest

from chiasm.errors import ConfigError
from chiasm_experiments.study import presence
from chiasm_experiments.study.folder import DRIVERS
from chiasm_experiments.study.presence import Presence, ProcessLock
from chiasm_experiments.study.record import Record, content_of
from chiasm_experiments.study.sweep import Options
from fake_pool import PLAIN, Bench, FakePool, score


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path).write()


@pytest.mark.parametrize("torn", [b'{"op_code":4,"wor', b"\x00\x00\x00", b""])
def test_a_line_that_a_kill_cut_off_is_removed_and_nothing_else(bench, torn):
    bench.sweep(Options(only="mlp"))
    journal = bench.out / "optuna.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn)
    assert bench.sweep().complete == 8
    assert journal.read_bytes().startswith(whole)
    assert bench.states() == ["COMPLETE"] * 8


HOLDER = """
import sys, time
from pathlib import Path
from chiasm_experiments.study.presence import Presence, ProcessLock
lock = ProcessLock(Path(sys.argv[1]) / "lock")
lock.acquire()
print(Presence(Path(sys.argv[1])).id, flush=True)
time.sleep(60)
"""


def test_a_killed_process_is_known_at_once_and_its_lock_is_free(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    name = holder.stdout.readline().strip()
    own = Presence(tmp_path)
    assert own.others() == [name]
    assert own.lives(name)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    started = time.monotonic()
    assert not own.lives(name)
    assert own.others() == []
    with ProcessLock(tmp_path / "lock"):
        assert time.monotonic() - started < 1
    own.forget_dead()
    assert [path.name for path in (tmp_path / DRIVERS).iterdir()] == [own.id]
    own.close()
    assert list((tmp_path / DRIVERS).iterdir()) == []


def test_a_driver_elsewhere_lives_while_it_shows_signs(tmp_path, monkeypatch):
    monkeypatch.setattr(presence, "QUIET_SECONDS", 0.2)
    own = Presence(tmp_path)
    other = tmp_path / DRIVERS / "elsewhere.7.abc"
    other.touch()
    assert own.lives(other.name)
    for _ in range(3):
        time.sleep(0.15)
        os.utime(other)
        assert own.lives(other.name)
    own._signs = type(own._signs)()
    assert own.lives(other.name)
    time.sleep(0.3)
    assert not own.lives(other.name)
    assert not own.lives("never.8.def")
    own.close()


def test_one_thread_of_all_holds_the_lock_and_may_take_it_again(tmp_path):
    inside, most = [], []

    def work():
        lock = ProcessLock(tmp_path / "lock")
        for _ in range(20):
            with lock, lock:
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 80
    assert max(most) == 1


def test_without_file_locks_optunas_links_take_their_place(bench, monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    assert bench.sweep().complete == 8
    assert bench.sweep().complete == 8
    assert bench.pool.started == []


def test_a_database_holds_the_record_and_refuses_another_folders(bench, tmp_path):
    url = f"sqlite:///{tmp_path / 'record.db'}"
    bench.write(storage=url)
    assert bench.sweep(Options(only="mlp")).complete == 4
    assert not (bench.out / "optuna.journal").exists()
    assert bench.sweep().complete == 8
    assert {t.state.name for t in optuna.load_study(study_name="tiny", storage=url).trials} == {"COMPLETE"}
    first, bench.out = bench.out, tmp_path / "elsewhere"
    with pytest.raises(ConfigError, match="study 'tiny' whose results lie in another folder"):
        bench.sweep()
    bench.out = first
    assert bench.sweep(Options(fresh=True)).complete == 8
    assert len(bench.pool.started) == 8
    bench.write(storage="nosuch://x")
    with pytest.raises(ConfigError, match="storage: the database 'nosuch://x' cannot be used"):
        bench.sweep()


def test_an_edit_that_is_killed_is_made_again(bench, monkeypatch):
    bench.sweep()

    class KilledError(BaseException):
        pass

    add = optuna.Study.add_trials

    def dies(self, trials):
        add(self, list(trials)[:3])
        raise KilledError

    bench.write(factors={"vision.adapter": ["linear", "mlp"], "stages.pretrain.lr": {"slow": 1e-4, "fast": 1e-2}})
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "add_trials", dies)
        with pytest.raises(KilledError):
            bench.sweep()
    assert bench.plan["revision"] == 1
    assert bench.sweep().complete == 8
    assert bench.pool.started == []
    assert bench.plan["revision"] == 2
    assert bench.states("tiny, revision 2") == ["COMPLETE"] * 8


def test_changed_objectives_are_worked_out_from_the_manifests(bench):
    bench.sweep()
    bench.write(objective={"minimize": ["visual_tokens", "trained_parameters"]})
    assert bench.sweep().complete == 8
    assert bench.pool.started == []
    assert any("objective was" in line for line in bench.said)
    for trial in bench.trials("tiny, revision 2"):
        assert trial.values[1:] == [16, 100]


def test_a_study_begins_whatever_a_killed_call_left_of_its_start(bench, monkeypatch):
    class KilledError(BaseException):
        pass

    def dies(*_, **__):
        raise KilledError

    for victim in ("_open", "add", "hold"):
        with monkeypatch.context() as patch:
            patch.setattr(Record, victim, dies)
            with pytest.raises(KilledError):
                bench.sweep()
    assert bench.sweep().complete == 8
    assert bench.states() == ["COMPLETE"] * 8


def test_names_end_with_what_was_run():
    assert content_of("mlp-lr-0-01-s0-db5693ac") == "db5693ac"
    assert FakePool(score).size == 1
    assert PLAIN.only is None

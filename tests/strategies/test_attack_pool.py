"""The pool: every job ends exactly once, whatever dies: files say so, one outcome and one mark of the attack a job."""

import io
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fedattack.cli import app as command_line
from fedattack.config import PoolSettings
from fedattack.errors import FedattackError
from fedattack.jobs import Job, Outcome, load_outcome, outcome_path, reconstruction_path, save_outcome
from fedattack.models import build_model
from fedattack.store import RunFolder, read_rows, save_update, write_json
from fedattack.types import Update
from strategies import attack_pool
from strategies.attack_pool import AttackPool, Heartbeat, PoolStatus, Running, attempts_path, execute
from strategies.pool_display import PoolDisplay

CONTEXT = {
    "model": {"name": "mlp", "options": {"hidden": [3]}},
    "image_shape": [1, 4, 4],
    "num_classes": 2,
    "task": {"name": "classification"},
}


class Folder:
    """A run folder with one update, and jobs on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = RunFolder(path / "run")
        self.update = path / "update.safetensors"
        self.gate = path / "gate"
        model = build_model("mlp", image_shape=(1, 4, 4), num_classes=2, seed=0, hidden=[3])
        sent = {name: tensor.detach() for name, tensor in model.named_parameters()}
        received = {name: torch.ones_like(tensor) for name, tensor in sent.items()}
        save_update(self.update, Update(1, "client-0", sent, received, "gradient", 1), CONTEXT)

    def job(self, name: str, attack: str = "Marked", *, gated: bool = False, **changes) -> Job:
        parameters = {"mark": str(self.path / name)} | ({"gate": str(self.gate)} if gated else {})
        return Job(name, str(self.update), f"pool_attacks:{attack}", parameters, **changes)

    def marks(self, name: str, what: str = "done") -> list[int]:
        path = self.path / f"{name}.{what}"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def outcome(self, name: str) -> Outcome:
        found = load_outcome(self.run.results, name)
        assert found is not None
        return found

    def attempts(self, name: str) -> list[dict]:
        return list(read_rows(attempts_path(self.run, name)))

    def all_once(self, names: list[str]) -> None:
        for name in names:
            assert self.outcome(name).status == "ok"
            assert reconstruction_path(self.run.results, name).exists()
            assert len(self.marks(name)) == 1, name

    def forget(self, name: str) -> None:
        outcome_path(self.run.results, name).unlink()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Folder(tmp_path)


def wait_for(condition, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


# ------------------------------------------------------------------------------------------------ a look from outside
def test_status_of_a_folder_is_what_the_disk_says_while_another_process_works(folder):
    """Done, failed, running, waiting; a worker that is killed in the middle leaves its job waiting again."""
    assert attack_pool.pool_status(folder.run) == PoolStatus()
    with inline(folder) as pool:
        for name, attack in (("a-good", "Marked"), ("b-bad", "Raises"), ("c-needy", "Needy")):
            pool.submit(folder.job(name, attack))
        pool.drain()
    folder.job("d-gated", gated=True).save(folder.run.jobs)
    folder.job("e-next").save(folder.run.jobs)
    assert attack_pool.pool_status(folder.run) == PoolStatus(total=5, done=2, failed=1, waiting=2)
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(str(folder.run.path), "d-gated"))
    worker.start()
    try:
        running = wait_for(lambda: attack_pool.pool_status(folder.run).running)
        assert (running[0].job, running[0].worker, running[0].pid) == ("d-gated", 7, worker.pid)
        assert attack_pool.pool_status(folder.run).waiting == 1
        done = CliRunner().invoke(command_line, ["pool", "status", str(folder.run.path)])
        assert "5 jobs: 2 done, 1 failed, 1 running, 1 waiting" in done.output
        assert "running  d-gated: " in done.output
        assert "failed   b-bad: RuntimeError: the attack has a bug" in done.output
        as_json = CliRunner().invoke(command_line, ["pool", "status", str(folder.run.path), "--json"])
        assert json.loads(as_json.output)["running"][0]["job"] == "d-gated"
    finally:
        worker.kill()
        worker.join()
    assert attack_pool.pool_status(folder.run) == PoolStatus(total=5, done=2, failed=1, waiting=2)


def work(run: str, job: str) -> None:
    """An attack worker without Ray, in a process of its own."""
    sys.path.insert(0, str(Path(__file__).parent))
    target = RunFolder(Path(run))
    beat = Heartbeat(lambda said: write_json(attack_pool.worker_path(target, 7), said), every=0.05)
    execute(target, job, beat, worker=7, session="other", max_attempts=3)


def test_status_of_no_folder_is_refused(tmp_path):
    done = CliRunner().invoke(command_line, ["pool", "status", str(tmp_path / "none")])
    assert "must be a run folder" in str(done.exception)


# ------------------------------------------------------------------------------------------------ in this process
def inline(folder: Folder, **options) -> AttackPool:
    return AttackPool(folder.run, PoolSettings(), **options)


def test_inline_jobs_run_in_drain_and_not_before(folder):
    names = [f"job-{number}" for number in range(3)]
    seen = []
    with inline(folder, on_outcome=seen.append) as pool:
        for name in names:
            pool.submit(folder.job(name))
        assert all((folder.run.jobs / f"{name}.json").exists() for name in names)
        assert not folder.marks("job-0", "begun")
        assert pool.status() == PoolStatus(total=3, waiting=3)
        outcomes = pool.drain()
    assert [outcome.job for outcome in outcomes] == names
    assert seen == outcomes
    assert pool.status() == PoolStatus(total=3, done=3)
    folder.all_once(names)


def test_inline_needs_no_ray(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with inline(folder) as pool:
        pool.submit(folder.job("job"))
        assert [outcome.status for outcome in pool.drain()] == ["ok"]


def test_inline_bad_attacks_hurt_only_themselves(folder):
    with inline(folder) as pool:
        for attack in ("Raises", "Needy", "Missing", "Marked"):
            pool.submit(folder.job(attack.lower(), attack))
        statuses = {outcome.job: outcome.status for outcome in pool.drain()}
    assert statuses == {"raises": "failed", "needy": "not-applicable", "missing": "failed", "marked": "ok"}
    assert "the attack has a bug" in folder.outcome("raises").error
    assert "cannot be imported" in folder.outcome("missing").error
    assert (pool.status().done, pool.status().failed) == (2, 2)


def test_inline_cooperative_timeout(folder):
    with inline(folder) as pool:
        pool.submit(folder.job("slow", "Slow", timeout_seconds=0.05))
        assert [outcome.status for outcome in pool.drain()] == ["timeout"]
    assert not folder.marks("slow")


def test_inline_what_is_done_is_not_done_again(folder):
    for _ in range(2):
        with inline(folder) as pool:
            pool.submit(folder.job("job"))
            pool.submit(folder.job("job"))
            assert [outcome.status for outcome in pool.drain()] == ["ok"]
            assert [outcome.status for outcome in pool.drain()] == ["ok"]
    folder.all_once(["job"])


def test_inline_resume_takes_what_has_no_outcome(folder):
    with inline(folder) as pool:
        for number in range(4):
            pool.submit(folder.job(f"job-{number}"))
        pool.drain(timeout=0.0)
    assert not folder.run.results.exists()
    save_outcome(folder.run.results, Outcome("job-2", "failed", "earlier"))
    with inline(folder) as pool:
        pool.submit(folder.job("job-3"))
        assert pool.resume() == ["job-0", "job-1"]
        assert pool.resume() == []
        pool.drain()
    folder.all_once(["job-0", "job-1", "job-3"])
    assert not folder.marks("job-2")


BAD_FILES = {
    "no-json": "{",
    "not-text": b"\xff\xfe\x00",
    "a-list": "[]",
    "unknown-key": '{"job": "unknown-key", "update": "", "attack": "dlg", "surprise": 1}',
    "wrong-id": '{"job": "another", "update": "", "attack": "dlg"}',
    "wrong-types": '{"job": "wrong-types", "update": 7, "attack": null, "timeout_seconds": "long"}',
    "bad-device": '{"job": "bad-device", "update": "", "attack": "dlg", "device": "abacus"}',
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_inline_bad_job_files_end_as_failed(folder, name):
    data = BAD_FILES[name]
    folder.run.jobs.mkdir(parents=True)
    (folder.run.jobs / f"{name}.json").write_bytes(data if isinstance(data, bytes) else data.encode())
    with inline(folder) as pool:
        assert pool.resume() == [name]
        (outcome,) = pool.drain()
    assert outcome.status == "failed"
    assert outcome.error
    assert folder.outcome(name) == outcome
    assert not outcome_path(folder.run.results, "another").exists()


def test_inline_missing_and_corrupt_updates_end_as_failed(folder):
    (folder.path / "corrupt").write_bytes(b"no tensors here")
    with inline(folder) as pool:
        pool.submit(Job("missing", str(folder.path / "nowhere"), "pool_attacks:Marked"))
        pool.submit(Job("corrupt", str(folder.path / "corrupt"), "pool_attacks:Marked"))
        pool.submit(folder.job("good"))
        assert [outcome.status for outcome in pool.drain()] == ["failed", "failed", "ok"]


def test_inline_an_unreadable_outcome_is_written_anew(folder):
    write_json(outcome_path(folder.run.results, "job"), ["no outcome"])
    with inline(folder) as pool:
        pool.submit(folder.job("job"))
        (outcome,) = pool.drain()
    assert folder.outcome("job") == outcome


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a/b"])
def test_job_ids_are_file_names(folder, name):
    with inline(folder) as pool, pytest.raises(FedattackError, match="plain file name"):
        pool.submit(folder.job(name))


def test_a_closed_pool_takes_nothing(folder):
    with inline(folder) as pool:
        pass
    with pytest.raises(FedattackError, match="closed"):
        pool.submit(folder.job("job"))


def test_inline_callbacks_that_raise_change_nothing(folder):
    def bad(_):
        raise ValueError("display")

    with inline(folder, on_outcome=bad) as pool:
        pool.submit(folder.job("job"))
        assert [outcome.status for outcome in pool.drain(on_status=bad)] == ["ok"]


def test_inline_status_shows_the_running_job(folder):
    seen = []
    with inline(folder) as pool:
        pool.submit(folder.job("job"))
        pool.submit(folder.job("slow", "Slow", timeout_seconds=0.6))
        pool.drain(on_status=seen.append)
    running = [status.running[0] for status in seen if status.running]
    assert {item.job for item in running} == {"job", "slow"}
    assert {item.pid for item in running} == {os.getpid()}
    assert any(item.job == "slow" and item.iteration == 1 and item.loss is None for item in running)
    assert all(status.waiting + len(status.running) + status.ended == 2 for status in seen)
    assert seen[-1] == pool.status() == PoolStatus(total=2, done=1, failed=1)


def test_inline_threads_are_those_of_the_settings(folder):
    before = torch.get_num_threads()
    with AttackPool(folder.run, PoolSettings(threads_per_worker=3)) as pool:
        pool.submit(folder.job("job", "Threads"))
        pool.drain()
    assert (folder.path / "job.threads").read_text() == "3"
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_inline_interrupt_leaves_the_job_for_later(folder, monkeypatch, kind):
    def interrupted(*_, **__):
        raise kind

    with inline(folder) as pool:
        pool.submit(folder.job("job"))
        with monkeypatch.context() as patch:
            patch.setattr(attack_pool, "run_job", interrupted)
            with pytest.raises(kind):
                pool.drain()
        assert pool.status() == PoolStatus(total=1, waiting=1)
        pool.drain()
    folder.all_once(["job"])


def _silent_heartbeat() -> Heartbeat:
    return Heartbeat(lambda beat: None, every=1.0)


def _execute(run: RunFolder, job: str, session: str = "s") -> None:
    execute(run, job, _silent_heartbeat(), worker=0, session=session, max_attempts=3)


def test_attempts_count_within_a_session(folder):
    folder.job("job").save(folder.run.jobs)
    for number in range(3):
        write_rows_of_a_dead_worker(folder, "job", "s", number)
    _execute(folder.run, "job")
    assert folder.outcome("job").error == "gave up: its worker died 3 times"
    folder.forget("job")
    _execute(folder.run, "job", session="another")
    folder.all_once(["job"])


def write_rows_of_a_dead_worker(folder: Folder, job: str, session: str, number: int) -> None:
    path = attempts_path(folder.run, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f'{{"session": "{session}", "worker": 0, "pid": {number}, "time": 0}}\n')


def test_two_processes_never_run_a_job_at_once(folder):
    folder.job("job", gated=True).save(folder.run.jobs)
    spawn = multiprocessing.get_context("fork")
    both = [spawn.Process(target=_execute, args=(folder.run, "job", f"driver-{number}")) for number in range(2)]
    for process in both:
        process.start()
    wait_for(lambda: folder.marks("job", "begun"))
    time.sleep(0.3)
    folder.gate.touch()
    for process in both:
        process.join()
    assert len(folder.marks("job", "begun")) == 1
    folder.all_once(["job"])


def test_heartbeats_never_raise():
    def broken(_):
        raise OSError("disk full")

    heartbeat = Heartbeat(broken, every=0.0)
    heartbeat.begin("job")
    heartbeat(1, 2, float("inf"))
    heartbeat("one", None, object())
    heartbeat.end()


# ------------------------------------------------------------------------------------------------ display
SHOWN = PoolStatus(total=5, done=1, failed=1, waiting=2, running=(Running("job-a", 0, 30, 100, 0.25, 4.0),))


def test_display_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=150)
    display = PoolDisplay(console)
    display(PoolStatus())
    display(SHOWN)
    display._bars.refresh()
    display(PoolStatus(total=5, done=4, failed=1))
    display(PoolStatus(total=5, done=4, failed=1))
    display.close()
    text = console.file.getvalue()
    for part in ("attacks", "2/5", "1 failed", "job-a", "30/100", "loss 2.500e-01", "5/5"):
        assert part in text


def test_display_elsewhere_logs_now_and_then(caplog):
    display = PoolDisplay(Console(file=io.StringIO()), log_seconds=1000.0)
    with caplog.at_level(logging.INFO, "fedattack.pool"):
        display(SHOWN)
        display(SHOWN)
        display(PoolStatus(total=5, done=4, failed=1))
    assert [record.message for record in caplog.records] == [
        "attacks: 2 of 5 ended, 1 failed; job-a 30/100 loss 2.500e-01",
        "attacks: 5 of 5 ended, 1 failed; idle",
    ]


# ------------------------------------------------------------------------------------------------ on Ray
SETTINGS = PoolSettings(workers=2, queue=2)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        address="local",
        num_cpus=2,
        resources={"attack": 2},
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        configure_logging=False,
    )
    yield ray
    ray.shutdown()


def on_ray(folder: Folder, **options) -> AttackPool:
    return AttackPool(folder.run, SETTINGS, **options)


def drain(pool: AttackPool, **options) -> list[Outcome]:
    """With a limit, so that a hanging pool fails its test and not the whole run."""
    outcomes = pool.drain(timeout=60.0, **options)
    assert pool.status().ended == pool.status().total
    return outcomes


def test_ray_all_jobs_end_whatever_they_do_and_the_queue_is_bounded(folder, ray):
    (folder.path / "corrupt").write_bytes(b"no tensors here")
    names = [f"job-{number:02}" for number in range(12)]
    seen, ended = [], []
    with on_ray(folder, on_outcome=ended.append) as pool:
        for name in names:
            pool.submit(folder.job(name, gated=True))
        running = wait_for(lambda: (status := pool.status()).running and len(status.running) == 2 and status)
        assert running.handed == 4
        assert {item.worker for item in running.running} == {0, 1}
        folder.gate.touch()
        for attack in ("Raises", "Needy", "Threads"):
            pool.submit(folder.job(attack.lower(), attack))
        pool.submit(folder.job("slow", "Slow", timeout_seconds=0.2))
        pool.submit(Job("missing", str(folder.path / "nowhere"), "pool_attacks:Marked"))
        pool.submit(Job("corrupt", str(folder.path / "corrupt"), "pool_attacks:Marked"))
        (folder.run.jobs / "no-job.json").write_text("{")
        assert pool.resume() == ["no-job"]
        outcomes = drain(pool, on_status=seen.append)
    statuses = {outcome.job: outcome.status for outcome in outcomes}
    assert [outcome.job for outcome in outcomes][:12] == names
    folder.all_once(names)
    assert {job: status for job, status in statuses.items() if job not in names} == {
        "raises": "failed",
        "needy": "not-applicable",
        "threads": "ok",
        "slow": "timeout",
        "missing": "failed",
        "corrupt": "failed",
        "no-job": "failed",
    }
    assert (folder.path / "threads.threads").read_text() == "1"
    assert os.getpid() not in folder.marks("job-00")
    assert max(status.handed for status in seen) <= SETTINGS.workers * SETTINGS.queue
    assert sorted(outcome.job for outcome in ended) == sorted(statuses)


@pytest.mark.parametrize("how", ["sigkill", "ray.kill", "ray.kill for good"])
def test_ray_a_killed_worker_loses_and_doubles_nothing(folder, ray, how):
    names = [f"job-{number}" for number in range(6)]
    with on_ray(folder) as pool:
        for name in names:
            pool.submit(folder.job(name, gated=True))
        victim = wait_for(lambda: next(iter(pool.status().running), None))
        wait_for(lambda: folder.marks(victim.job, "begun"))
        if how == "sigkill":
            os.kill(victim.pid, signal.SIGKILL)
        else:
            ray.kill(pool._slots[victim.worker].actor, no_restart=how == "ray.kill for good")
        wait_for(lambda: not Path(f"/proc/{victim.pid}/cmdline").exists())
        folder.gate.touch()
        drain(pool)
    folder.all_once(names)
    pids = {row["pid"] for row in folder.attempts(victim.job)}
    assert len(pids) == 2
    assert victim.pid in pids
    assert folder.marks(victim.job)[0] != victim.pid


def test_ray_poison_and_mute_jobs_end_and_the_others_too(folder, ray):
    names = [f"job-{number}" for number in range(4)]
    with on_ray(folder, grace_seconds=0.3) as pool:
        pool.submit(folder.job("poison", "Killer"))
        pool.submit(folder.job("exits", "Exits"))
        pool.submit(folder.job("mute", "Mute", timeout_seconds=0.5))
        for name in names:
            pool.submit(folder.job(name))
        drain(pool)
    folder.all_once(names)
    for name in ("poison", "exits"):
        assert folder.outcome(name).status == "failed"
        assert folder.outcome(name).error == "gave up: its worker died 3 times"
        assert len(folder.marks(name, "begun")) == 3
    assert folder.outcome("mute").status == "timeout"
    assert "killed" in folder.outcome("mute").error
    assert len(folder.marks("mute", "begun")) == 1


def test_ray_a_new_pool_resumes_what_an_abandoned_one_left(folder, ray):
    names = [f"job-{number}" for number in range(5)]
    with on_ray(folder) as pool:
        for name in names:
            pool.submit(folder.job(name, gated=True))
        begun = wait_for(lambda: [name for name in names if folder.marks(name, "begun")])
        assert pool.drain(timeout=0.0) == []
    folder.gate.touch()
    with on_ray(folder) as pool:
        assert pool.resume() == [name for name in names if load_outcome(folder.run.results, name) is None]
        drain(pool)
    folder.all_once(names)
    assert begun


def test_ray_more_gpus_than_there_are_is_refused(folder, ray):
    with pytest.raises(FedattackError, match="GPUs of this Ray cluster, got 9000"):
        AttackPool(folder.run, PoolSettings(workers=3, gpus_per_worker=3000)).start()
    assert ray.is_initialized()


def test_ray_workers_go_where_their_resource_is_and_nowhere_else(folder, ray):
    with pytest.raises(
        FedattackError, match=r"at most 2, what this Ray cluster offers of the resource 'attack'.*got 3"
    ):
        AttackPool(folder.run, PoolSettings(workers=3, resource="attack")).start()
    with pytest.raises(FedattackError, match="at most 0"):
        AttackPool(folder.run, PoolSettings(workers=1, resource="elsewhere")).start()
    with AttackPool(folder.run, PoolSettings(workers=1, resource="attack")) as pool:
        pool.submit(folder.job("job"))
        drain(pool)
        assert ray.available_resources()["attack"] == 1
    folder.all_once(["job"])


def test_ray_workers_that_cannot_start_are_said_and_not_waited_for(folder, ray, monkeypatch):
    monkeypatch.setattr(attack_pool, "MAX_FAILED_STARTS", 1)
    impossible = PoolSettings(workers=1).model_copy(update={"threads_per_worker": 0})
    with AttackPool(folder.run, impossible) as pool:
        pool.submit(folder.job("job"))
        with pytest.raises(FedattackError, match="1 attack jobs have no outcome: attack workers cannot start"):
            pool.drain(timeout=60.0)
    assert not folder.marks("job", "begun")


def test_ray_of_its_own_goes_with_the_pool_and_its_loss_is_survived(folder, ray):
    """Last: it shuts the shared Ray down first. Then Ray vanishes under a pool, as Flower makes it do."""
    ray.shutdown()
    with on_ray(folder) as pool:
        assert ray.is_initialized()
        pool.submit(folder.job("job", gated=True))
        wait_for(lambda: folder.marks("job", "begun"))
        ray.shutdown()
        with pytest.raises(FedattackError, match="1 attack jobs have no outcome: Ray was shut down"):
            pool.drain(timeout=60.0)
        assert not ray.is_initialized()
    folder.gate.touch()
    with inline(folder) as pool:
        pool.resume()
        pool.drain()
    folder.all_once(["job"])

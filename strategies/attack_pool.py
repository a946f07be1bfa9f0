"""Attack jobs beside a federation: on Ray actors that may die at any moment, or one after another in this process.

    with AttackPool(run, settings) as pool:
        pool.submit(job)                       # on disk first; returns at once; training goes on
        pool.drain()                           # before a ServerApp returns: Flower shuts Ray down right afterwards

The disk decides. A job is a file in `jobs/` until its outcome is a file in `results/`; Ray carries ids only. Whoever runs a
job holds a lock on `attempts/<job>.jsonl`, so it never runs twice at the same time, and a job that has an outcome is not run
again. So actors, driver and Ray itself may be killed; `resume` in a new process goes on with what has no outcome.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Condition, Event, Thread
from types import TracebackType
from typing import Any
from uuid import uuid4

from fedattack.config import PoolSettings
from fedattack.errors import FedattackError, must
from fedattack.jobs import Job, Outcome, load_outcome, run_job, save_outcome, torch_threads
from fedattack.store import RunFolder, finite, private_folder, read_json, read_rows, write_json

log = logging.getLogger("fedattack.pool")

NAMESPACE = "fedattack"
ENDED_WELL = frozenset({"ok", "not-applicable"})
MAX_ATTEMPTS = 3
MAX_HANDOVERS = 10
MAX_FAILED_STARTS = 5
TICK_SECONDS = 0.1


@dataclass(frozen=True)
class Running:
    """A job that is running now, as its worker last said (about once a second). loss is None before the first one."""

    job: str
    worker: int
    iteration: int = 0
    iterations: int = 0
    loss: float | None = None
    seconds: float = 0.0
    pid: int = 0


@dataclass(frozen=True)
class PoolStatus:
    """done: "ok" or "not-applicable"; failed: "failed" or "timeout"; waiting: neither ended nor running.

    handed: jobs that Ray holds now, running ones included; never more than workers × queue.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    waiting: int = 0
    handed: int = 0
    running: tuple[Running, ...] = ()

    @property
    def ended(self) -> int:
        return self.done + self.failed


OnStatus = Callable[[PoolStatus], None]
OnOutcome = Callable[[Outcome], None]


# ------------------------------------------------------------------------------------------------ one job, anywhere
def attempts_path(run: RunFolder, job: str) -> Path:
    """One JSON line a time that a worker began the job: {session, worker, pid, time}."""
    return run.path / "attempts" / f"{job}.jsonl"


def worker_path(run: RunFolder, worker: int) -> Path:
    """What a worker does now: {job, iteration, iterations, loss, seconds, pid}; job is null while it is idle."""
    return run.path / "workers" / f"{worker}.json"


class Heartbeat:
    """The progress of a worker's job, told at most once in `every` seconds. Telling never raises into an attack."""

    def __init__(self, tell: Callable[[dict[str, Any]], None], *, every: float) -> None:
        self._tell, self._every = tell, every
        self._job: str | None = None
        self._begun = self._told = 0.0

    def begin(self, job: str) -> None:
        self._job, self._begun = job, time.monotonic()
        self._say(0, 0, None)
        self._told = 0.0  # the first iteration is told at once

    def __call__(self, iteration: int, iterations: int, loss: float) -> None:
        if time.monotonic() - self._told >= self._every:
            self._say(iteration, iterations, loss)

    def end(self) -> None:
        self._job = None
        self._say(0, 0, None)

    def _say(self, iteration: int, iterations: int, loss: float | None) -> None:
        self._told = time.monotonic()
        with suppress(Exception):
            beat = {
                "job": self._job,
                "iteration": int(iteration),
                "iterations": int(iterations),
                "loss": None if loss is None else finite(float(loss)),
                "seconds": self._told - self._begun,
                "pid": os.getpid(),
            }
            self._tell(beat)


def execute(
    run: RunFolder, job_id: str, heartbeat: Heartbeat, *, worker: int, session: str, max_attempts: int
) -> Outcome:
    """Bring a job of the run folder to its outcome, whatever its files hold; gives the outcome that is on disk.

    Attempts of earlier sessions do not count: three interrupted campaigns say nothing about a job. SystemExit passes, since
    it is how Ray ends a worker (SIGTERM); an attack that raises it thus counts as one that kills its worker.
    """
    with _locked(attempts_path(run, job_id)) as attempts:
        if (done := _outcome(run, job_id)) is not None:
            return done
        died = sum(row.get("session") == session for row in read_rows(attempts))
        if died >= max_attempts:
            return _give_up(run, job_id, f"gave up: its worker died {died} times")
        with attempts.open("a") as file:
            file.write(
                json.dumps({"session": session, "worker": worker, "pid": os.getpid(), "time": time.time()}) + "\n"
            )
        heartbeat.begin(job_id)
        try:
            job = Job.load(run.jobs / f"{job_id}.json")
            if job.job != job_id:
                raise FedattackError(must(f"the id in jobs/{job_id}.json", repr(job_id), job.job))
            return run_job(job, run.results, progress=heartbeat)
        except Exception as error:  # run_job keeps what attacks raise, so this is a bad file
            return _give_up(run, job_id, f"{type(error).__name__}: {error}")
        finally:
            heartbeat.end()


class AttackWorker:
    """The actor. It holds nothing that is not on disk, so Ray may restart it and call it again at will."""

    def __init__(self, run: str, number: int, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._run, self._number = RunFolder(Path(run)), number
        self._heartbeat = Heartbeat(partial(write_json, worker_path(self._run, number)), every=1.0)
        self._heartbeat.end()

    def ready(self) -> int:
        return os.getpid()

    def run(self, job_id: str, session: str, max_attempts: int) -> str:
        import torch

        outcome = execute(
            self._run, job_id, self._heartbeat, worker=self._number, session=session, max_attempts=max_attempts
        )
        if outcome.pid == os.getpid() and "CUDA error" in outcome.error:
            os._exit(1)  # the CUDA context of this process is broken for good; Ray starts another one
        torch.cuda.empty_cache()  # so that a smaller model does not meet a larger one's memory; nothing without CUDA
        return outcome.status

    def finish(self) -> None:
        """Queued last on a detached actor whose driver leaves: it ends once its queue is empty."""
        import ray

        ray.actor.exit_actor()


# ------------------------------------------------------------------------------------------------ the pool
@dataclass
class _Slot:
    """One worker as the driver sees it. Touched by the pool's thread only."""

    number: int
    actor: Any = None
    generation: int = 0
    ready: bool = False
    failed_starts: int = 0
    retry_at: float | None = None
    hands: dict[str, Any] = field(default_factory=dict)
    beat: tuple[str, int] = ("", 0)
    since: float = 0.0


@dataclass(frozen=True)
class _Event:
    """A reply of an actor; job is empty where it says that it is ready."""

    slot: int
    generation: int
    job: str
    error: BaseException | None


class AttackPool:
    """Runs the attack jobs of one run folder; see PoolSettings for where.

    workers = 0: in this process, in `drain`; Ray is not imported. Otherwise on named Ray actors, in the cluster at
    settings.address (or RAY_ADDRESS; actors there are detached and work on without a driver), in the Ray that this process
    uses already, or in a local Ray of its own that `close` shuts down.

    wait_for_ray: this runs inside Flower's simulation, which initialises Ray in another thread at this moment: wait for it.
    on_outcome is called once a job that ends under this pool, from the pool's thread; what it raises is logged.
    grace_seconds: a job that does not stop by itself this long after its timeout is killed with its worker (default: half
    of the timeout, at least 30 s). No such thing exists with workers = 0.
    """

    def __init__(
        self,
        run: RunFolder,
        settings: PoolSettings,
        *,
        on_outcome: OnOutcome | None = None,
        wait_for_ray: bool = False,
        max_attempts: int = MAX_ATTEMPTS,
        grace_seconds: float | None = None,
        start_timeout_seconds: float = 300.0,
    ) -> None:
        self._run = RunFolder(run.path.resolve())
        self._settings = settings
        self._on_outcome = on_outcome
        self._wait_for_ray = wait_for_ray
        self._max_attempts = max_attempts
        self._grace = grace_seconds
        self._start_timeout = start_timeout_seconds
        self._address = settings.address or os.environ.get("RAY_ADDRESS", "")
        self._session = uuid4().hex[:12]
        self._changed = Condition()
        self._timeouts: dict[str, float] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._waiting: deque[str] = deque()
        self._handovers: dict[str, int] = {}
        self._running: tuple[Running, ...] = ()
        self._slots: list[_Slot] = []
        self._events: SimpleQueue[_Event | None] = SimpleQueue()
        self._stop = Event()
        self._thread: Thread | None = None
        self._broken = ""
        self._owns_ray = False
        self._closed = False
        self._alive = 0.0

    # ---- life
    def start(self) -> "AttackPool":
        """Connect and start the workers (not waiting for them). Raises FedattackError where they could never run."""
        if self._closed:
            raise FedattackError("this attack pool is closed: make a new one")
        if self._settings.workers == 0 or self._thread is not None:
            return self
        for folder in (self._run.path, self._run.jobs, self._run.results):
            private_folder(folder)
        self._connect()
        try:
            self._check_resources()
            self._slots = [_Slot(number) for number in range(self._settings.workers)]
            for slot in self._slots:
                self._launch(slot)
        except BaseException:
            self._disconnect()
            raise
        self._alive = time.monotonic()
        self._thread = Thread(target=self._loop, name="fedattack-pool", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop the workers; nothing of this pool runs afterwards.

        Detached ones with jobs left are given all of them instead and end by themselves.
        """
        if self._closed:
            return
        self._closed = True
        self._stop.set()
        self._events.put(None)
        if self._thread is not None:
            self._thread.join(30.0)
        if left := self._unfinished():
            log.info("closed with %d attack jobs left in %s", len(left), self._run.jobs)
        if self._slots and _ray_is_up():
            with suppress(Exception):
                self._leave() if self._address and left else self._kill_all()
        self._disconnect()

    def __enter__(self) -> "AttackPool":
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ---- jobs
    def submit(self, job: Job) -> None:
        """Write the job file, then queue its id; a job that is known or has an outcome is not queued again."""
        if not re.fullmatch(r"[^./\\\0][^/\\\0]*", job.job):
            raise FedattackError(must("a job's id", "a plain file name", job.job))
        if self._closed:
            raise FedattackError(f"this attack pool is closed: job {job.job!r} cannot be submitted")
        job.save(self._run.jobs)
        self._add(job.job, job.timeout_seconds)

    def resume(self) -> list[str]:
        """Queue every job on disk that has no outcome; gives their ids. Files that are no jobs end as failed."""
        queued = []
        for path in sorted(self._run.jobs.glob("*.json")):
            with self._changed:
                if path.stem in self._timeouts:
                    continue
            if _outcome(self._run, path.stem) is not None:
                continue
            limit = self._settings.timeout_seconds
            with suppress(Exception):  # whoever runs it writes down what is wrong with the file
                limit = float(Job.load(path).timeout_seconds)
            if self._add(path.stem, limit):
                queued.append(path.stem)
        return queued

    def drain(self, timeout: float | None = None, on_status: OnStatus | None = None) -> list[Outcome]:
        """Wait until every known job has an outcome, or `timeout` seconds; gives the outcomes in order of submission.

        on_status is called about twice a second and at the end. With workers = 0 the jobs run here, and the timeout is
        looked at between jobs. Raises FedattackError where the workers are gone for good; the jobs stay on disk.
        """
        end = None if timeout is None else time.monotonic() + timeout
        if self._settings.workers == 0:
            self._drain_here(end, on_status)
        else:
            self._drain_ray(end, on_status)
        self._show(on_status)
        with self._changed:
            return [self._outcomes[job] for job in self._timeouts if job in self._outcomes]

    def status(self) -> PoolStatus:
        with self._changed:
            done = sum(outcome.status in ENDED_WELL for outcome in self._outcomes.values())
            running = tuple(item for item in self._running if item.job not in self._outcomes)
            return PoolStatus(
                total=len(self._timeouts),
                done=done,
                failed=len(self._outcomes) - done,
                waiting=len(self._timeouts) - len(self._outcomes) - len(running),
                handed=len(self._handed()),
                running=running,
            )

    # ---- bookkeeping
    def _add(self, job: str, timeout: float) -> bool:
        done = _outcome(self._run, job)
        with self._changed:
            if job in self._timeouts:
                return False
            self._timeouts[job] = timeout
            if done is not None:
                self._outcomes[job] = done
            else:
                self._waiting.append(job)
            self._changed.notify_all()
        self._events.put(None)
        return done is None

    def _end(self, job: str, outcome: Outcome) -> None:
        with self._changed:
            if job in self._outcomes:
                return
            self._outcomes[job] = outcome
            with suppress(ValueError):
                self._waiting.remove(job)
            self._changed.notify_all()
        if outcome.status not in ENDED_WELL:
            log.warning("attack job %s: %s: %s", job, outcome.status, outcome.error.split("\n")[0])
        if self._on_outcome is not None:
            try:
                self._on_outcome(outcome)
            except Exception:
                log.exception("on_outcome raised for job %s", job)

    def _unfinished(self) -> list[str]:
        with self._changed:
            return [job for job in self._timeouts if job not in self._outcomes]

    def _handed(self) -> list[str]:
        return [job for slot in self._slots for job in tuple(slot.hands)]

    def _show(self, on_status: OnStatus | None) -> None:
        if on_status is not None:
            try:
                on_status(self.status())
            except Exception:
                log.exception("the display of the attack pool raised")

    # ---- in this process
    def _drain_here(self, end: float | None, on_status: OnStatus | None) -> None:
        def tell(beat: dict[str, Any]) -> None:
            self._running = () if beat["job"] is None else (Running(worker=0, **beat),)
            self._show(on_status)

        heartbeat = Heartbeat(tell, every=0.25)
        with torch_threads(self._settings.threads_per_worker):
            while end is None or time.monotonic() < end:
                with self._changed:
                    if not self._waiting:
                        break
                    job = self._waiting.popleft()
                try:
                    outcome = execute(
                        self._run,
                        job,
                        heartbeat,
                        worker=0,
                        session=self._session,
                        max_attempts=self._max_attempts,
                    )
                except BaseException:
                    with self._changed:
                        self._waiting.appendleft(job)
                    raise
                self._end(job, outcome)

    # ---- on Ray, called by the user's thread
    def _drain_ray(self, end: float | None, on_status: OnStatus | None) -> None:
        if self._thread is None and self._unfinished():
            raise FedattackError("the attack pool must be started before it is drained")
        while self._unfinished() and (end is None or time.monotonic() < end):
            if self._broken or self._closed:
                reason = self._broken or "the pool was closed"
                raise FedattackError(
                    f"{len(self._unfinished())} attack jobs have no outcome: {reason}; they are in {self._run.jobs} and "
                    "a rerun goes on with them"
                )
            self._show(on_status)
            with self._changed:
                self._changed.wait(0.5 if end is None else max(0.0, min(0.5, end - time.monotonic())))

    def _connect(self) -> None:
        import ray

        if self._wait_for_ray:
            limit = time.monotonic() + 120.0
            while not ray.is_initialized():
                if time.monotonic() > limit:
                    raise FedattackError("Flower did not initialise Ray within 120 seconds")
                time.sleep(0.05)
            return
        if ray.is_initialized():
            return
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        with _environment(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0"):
            try:
                if self._address:
                    ray.init(
                        address=self._address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
                    )
                else:
                    ray.init(
                        address="local",
                        namespace=NAMESPACE,
                        num_cpus=self._settings.workers,
                        object_store_memory=100 * 2**20,  # nothing of ours travels through it
                        **quiet,
                    )
            except Exception as error:
                where = f"the Ray cluster at {self._address!r}" if self._address else "a local Ray"
                raise FedattackError(f"cannot start {where}: {error}") from error
        self._owns_ray = True

    def _disconnect(self) -> None:
        if self._owns_ray:
            import ray

            self._owns_ray = False
            with suppress(Exception):
                ray.shutdown()

    def _check_resources(self) -> None:
        """Ray lets an actor wait for ever for what the cluster does not have."""
        import ray

        workers, name = self._settings.workers, self._settings.resource
        if needed := workers * self._settings.gpus_per_worker:
            there = float(ray.cluster_resources().get("GPU", 0.0))
            if needed > there:
                rule = f"at most {there:g}, the GPUs of this Ray cluster"
                raise FedattackError(must("pool.workers × pool.gpus_per_worker", rule, needed))
        if name:
            there = float(ray.cluster_resources().get(name, 0.0))
            if workers > there:
                rule = f"at most {there:g}, what this Ray cluster offers of the resource {name!r} (pool.resource)"
                raise FedattackError(must("pool.workers", rule, workers))

    def _launch(self, slot: _Slot) -> None:
        """A new actor (detached: the one of this name, if it lives) and the question whether it is ready."""
        import ray

        settings = self._settings
        run = hashlib.sha256(str(self._run.path).encode()).hexdigest()[:10]
        name = f"{run}-{slot.number}" if self._address else f"{run}-{self._session}-{slot.number}-{slot.generation}"
        threads = str(settings.threads_per_worker)
        environment = {
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(str(Path(p).resolve()) for p in sys.path if Path(p).exists())),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        if settings.gpus_per_worker == 0:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # a worker without a reserved GPU works on the CPU
        try:
            slot.actor = (
                ray.remote(AttackWorker)
                .options(
                    name=name,
                    namespace=NAMESPACE,
                    get_if_exists=True,
                    lifetime="detached" if self._address else None,
                    num_cpus=0,
                    num_gpus=settings.gpus_per_worker,
                    resources={settings.resource: 1} if settings.resource else None,
                    max_restarts=-1,
                    max_task_retries=-1,
                    max_concurrency=1,
                    runtime_env={"env_vars": environment},
                )
                .remote(str(self._run.path), slot.number, settings.threads_per_worker)
            )
        except ValueError as error:
            raise FedattackError(f"Ray refuses attack workers as configured under [pool]: {error}") from error
        slot.ready, slot.retry_at = False, None
        self._listen(slot, "", slot.actor.ready.remote())

    def _listen(self, slot: _Slot, job: str, reference: Any) -> None:
        number, generation, events = slot.number, slot.generation, self._events

        def replied(future: Any) -> None:
            events.put(_Event(number, generation, job, future.exception()))

        if job:
            slot.hands[job] = reference
        reference.future().add_done_callback(replied)

    def _leave(self) -> None:
        """Give detached actors all that is left, and the order to end afterwards."""
        slots = [slot for slot in self._slots if slot.ready]
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        for job in waiting if slots else ():
            slot = min(slots, key=lambda slot: len(slot.hands))
            slot.hands[job] = slot.actor.run.remote(job, self._session, self._max_attempts)
        farewells = [slot.actor.finish.remote() for slot in self._slots]
        time.sleep(1.0)  # calls leave this process in the background
        log.info("%d detached attack workers go on without this process", len(farewells))

    def _kill_all(self) -> None:
        """Returns once no job of these workers runs any more, which their locks show."""
        import ray

        for slot in self._slots:
            if slot.actor is not None and ray.is_initialized():
                with suppress(Exception):
                    ray.kill(slot.actor)
        limit = time.monotonic() + 5.0
        for job in {item.job for item in self._running} | set(self._handed()):
            while _is_locked(attempts_path(self._run, job)) and time.monotonic() < limit:
                time.sleep(0.02)

    # ---- on Ray, the pool's own thread
    def _loop(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                events = self._next_events()
                if self._stop.is_set():
                    return
                if not _ray_is_up():
                    self._break("Ray was shut down")
                    return
                self._tick(events)
                failures = 0
            except Exception as error:
                failures += 1
                if self._stop.is_set() or not _ray_is_up():
                    self._break("Ray was shut down")
                    return
                log.warning("the attack pool stumbled: %s: %s", type(error).__name__, error, exc_info=failures == 1)
                if failures >= 20:
                    self._break(f"the pool failed again and again: {type(error).__name__}: {error}")
                    return
                self._stop.wait(0.5)

    def _next_events(self) -> list[_Event]:
        events = []
        wait = TICK_SECONDS
        with suppress(Empty):
            while True:
                event = self._events.get(timeout=wait) if wait else self._events.get_nowait()
                wait = 0.0
                if event is not None:
                    events.append(event)
        return events

    def _tick(self, events: list[_Event]) -> None:
        for event in events:
            slot = self._slots[event.slot]
            if event.generation != slot.generation:
                continue
            if not event.job:
                self._on_ready(slot, event.error)
            else:
                self._on_reply(slot, event.job, event.error)
        for slot in self._slots:
            if slot.retry_at is not None and time.monotonic() >= slot.retry_at:
                slot.retry_at = time.monotonic() + 1.0  # in case that this fails
                self._launch(slot)
        self._watch()
        self._dispatch()
        if any(slot.ready for slot in self._slots):
            self._alive = time.monotonic()
        elif time.monotonic() - self._alive > self._start_timeout:
            self._break(
                f"no attack worker could start within {self._start_timeout:g} seconds; are the GPUs that "
                f"pool.gpus_per_worker = {self._settings.gpus_per_worker:g} asks for taken by Flower's clients?"
            )

    def _break(self, reason: str) -> None:
        with self._changed:
            self._broken = reason
            self._running = ()
            self._stop.set()
            self._changed.notify_all()
        if left := self._unfinished():
            log.info("the attack pool stopped with %d jobs left on disk: %s", len(left), reason)

    def _on_ready(self, slot: _Slot, error: BaseException | None) -> None:
        if error is None:
            slot.ready, slot.failed_starts = True, 0
            return
        slot.failed_starts += 1
        log.warning("attack worker %d did not start: %s", slot.number, str(error).split("\n")[0])
        if slot.failed_starts < MAX_FAILED_STARTS:
            self._replace(slot)
        elif all(other.failed_starts >= MAX_FAILED_STARTS for other in self._slots):
            self._break(f"attack workers cannot start: {error}")

    def _on_reply(self, slot: _Slot, job: str, error: BaseException | None) -> None:
        from ray.exceptions import ActorUnavailableError, RayTaskError

        slot.hands.pop(job, None)
        if (outcome := _outcome(self._run, job)) is not None:
            self._end(job, outcome)
        elif isinstance(error, RayTaskError):
            self._end(job, _give_up(self._run, job, f"the worker failed: {error}"))
        else:
            self._hand_back(job, str(error))
        if error is not None and not isinstance(error, RayTaskError | ActorUnavailableError):
            log.info("attack worker %d is gone, another one takes its place: %s", slot.number, type(error).__name__)
            self._replace(slot)

    def _replace(self, slot: _Slot) -> None:
        """Jobs in the hands of an actor that is gone for good wait again, and a new one starts a little later."""
        import ray

        for job in list(slot.hands):
            self._hand_back(job, "its worker is gone")
        slot.hands.clear()
        slot.ready, slot.generation, slot.retry_at = (
            False,
            slot.generation + 1,
            time.monotonic() + 0.5 * (1 + slot.failed_starts),
        )
        with suppress(Exception):
            ray.kill(slot.actor)

    def _hand_back(self, job: str, reason: str) -> None:
        handovers = self._handovers.get(job, 0)
        if handovers >= MAX_HANDOVERS:
            self._end(job, _give_up(self._run, job, f"handed to a worker {handovers} times in vain: {reason}"))
            return
        with self._changed:
            if job not in self._outcomes and job not in self._waiting:
                self._waiting.appendleft(job)

    def _dispatch(self) -> None:
        while True:
            free = [slot for slot in self._slots if slot.ready and len(slot.hands) < self._settings.queue]
            with self._changed:
                if not free or not self._waiting:
                    return
                job = self._waiting.popleft()
                self._handovers[job] = self._handovers.get(job, 0) + 1
            slot = min(free, key=lambda slot: len(slot.hands))
            try:
                reference = slot.actor.run.remote(job, self._session, self._max_attempts)
            except BaseException:
                self._hand_back(job, "Ray did not take it")
                raise
            self._listen(slot, job, reference)

    def _watch(self) -> None:
        """Read the heartbeats, and end what neither stopped by itself nor says anything."""
        running = []
        for slot in self._slots:
            beat = _beat(self._run, slot.number) if slot.ready else None
            if beat is None or beat.job in self._outcomes or beat.job not in self._timeouts:
                slot.beat = ("", 0)
                continue
            now = time.monotonic()
            if slot.beat != (beat.job, beat.pid):
                slot.beat, slot.since = (beat.job, beat.pid), now - beat.seconds
            seconds = now - slot.since
            limit = self._timeouts[beat.job]
            grace = max(30.0, 0.5 * limit) if self._grace is None else self._grace
            if seconds > limit + grace:
                self._kill_late(slot, beat.job, seconds)
            else:
                running.append(replace(beat, seconds=seconds))
        self._running = tuple(running)

    def _kill_late(self, slot: _Slot, job: str, seconds: float) -> None:
        """The outcome comes first: the call that Ray repeats after the kill finds it and returns at once."""
        import ray

        if _outcome(self._run, job) is None:
            error = f"its worker was killed after {seconds:.0f} seconds: the attack did not stop at its limit by itself"
            outcome = Outcome(job=job, status="timeout", error=error, seconds=seconds, finished=time.time())
            save_outcome(self._run.results, outcome)
            ray.kill(slot.actor, no_restart=False)
        if (written := _outcome(self._run, job)) is not None:
            self._end(job, written)


# ------------------------------------------------------------------------------------------------ a look from outside
def pool_status(run: RunFolder) -> PoolStatus:
    """How the jobs of a run folder stand, read from the disk alone: from any process that sees it, with or without a pool.

    A job runs if somebody holds its lock; a worker that died in the middle holds none, and its job waits again.
    """
    outcomes = {path.stem: _outcome(run, path.stem) for path in run.jobs.glob("*.json")}
    done = sum(outcome is not None and outcome.status in ENDED_WELL for outcome in outcomes.values())
    failed = sum(outcome is not None and outcome.status not in ENDED_WELL for outcome in outcomes.values())
    beats = (
        _beat(run, int(path.stem)) for path in sorted((run.path / "workers").glob("*.json")) if path.stem.isdigit()
    )
    running = tuple(
        beat
        for beat in beats
        if beat is not None and outcomes.get(beat.job, beat) is None and _is_locked(attempts_path(run, beat.job))
    )
    return PoolStatus(
        total=len(outcomes),
        done=done,
        failed=failed,
        waiting=len(outcomes) - done - failed - len(running),
        handed=len(running),
        running=running,
    )


# ------------------------------------------------------------------------------------------------ helpers
def _outcome(run: RunFolder, job: str) -> Outcome | None:
    """The outcome on disk; None where there is none or where the file is none (it is then written anew)."""
    try:
        return load_outcome(run.results, job)
    except (OSError, ValueError, TypeError):
        return None


def _give_up(run: RunFolder, job: str, error: str) -> Outcome:
    outcome = Outcome(job=job, status="failed", error=error, pid=os.getpid(), finished=time.time())
    try:
        save_outcome(run.results, outcome)
    except OSError:
        log.exception("the outcome of job %s could not be written", job)
    return outcome


def _beat(run: RunFolder, worker: int) -> Running | None:
    try:
        beat = read_json(worker_path(run, worker))
        return None if beat["job"] is None else Running(worker=worker, **beat)
    except (OSError, ValueError, TypeError, KeyError):
        return None


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Hold the file (made if need be) against every other process; the system lets go of it when this one dies."""
    private_folder(path.parent)
    with path.open("a") as file:
        with suppress(OSError):  # a file system without locks: outcomes alone must do
            fcntl.flock(file, fcntl.LOCK_EX)
        yield path


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Defaults for variables that nobody set, taken away again afterwards."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _ray_is_up() -> bool:
    import ray

    return bool(ray.is_initialized())

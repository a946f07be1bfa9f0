"""What a deployment costs on this machine: seconds a round, and memory of every process.

    python -m experiments.deployment_cost --clients 10                      a small model: what Flower and Python take
    python -m experiments.deployment_cost --clients 10 --megabytes 100      does the server's memory grow with the rounds?

Everything runs on loopback (experiments/deployment.py); every update is copied, none is attacked unless --attack. Memory is
the proportional set size (shared pages are divided among those that share them), the largest of samples
taken a second apart and more (they take time themselves).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from experiments.deployment import Deployment, DeploymentError, processes_of, run_deployed
from fedattack.config import Experiment, parse_config
from fedattack.store import RunFolder

RESERVE_MIB = 3000
PIXELS = 3 * 8 * 8
CLASSES = 8


def experiment_of(clients: int, rounds: int, megabytes: float, *, attack: bool) -> Experiment:
    """An MLP of about so many megabytes (float32) on 8×8 patches; the smallest has one layer of 32 units."""
    width = 32
    while 4 * (PIXELS * width + width * width + width * CLASSES) < megabytes * 1e6:
        width += 8
    return parse_config(
        {
            "name": "cost",
            "data": {"options": {"image_size": 8}},
            "model": {"name": "mlp", "options": {"hidden": [width, width] if megabytes else [width]}},
            "federation": {"clients": clients, "rounds": rounds},
            "pool": {"workers": 1 if attack else 0},
            "score": {"lpips": [], "floor": "off"},
            "attack": ["linear-leak"] if attack else [],
        }
    )


def memory_of(deployment: Deployment) -> dict[str, float]:
    """MiB (proportional set size) of every component with what it started."""
    found = {}
    for name, component in deployment.components.items():
        total = 0.0
        for pid in processes_of("", {component.pid}):
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            total += sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))
        found[name] = total
    return found


def available_mib() -> float:
    """Memory that this machine has left, as its kernel sees it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:"))


def measure(clients: int, rounds: int, megabytes: float, *, attack: bool, folder: Path) -> dict[str, object]:
    experiment = experiment_of(clients, rounds, megabytes, attack=attack)
    ends: dict[int, float] = {}
    peaks: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    begun = time.monotonic()
    with Deployment(clients, folder / "logs", attack_workers=experiment.pool.workers) as up:
        ready = time.monotonic()

        def watch() -> None:
            up.check()
            if available_mib() < RESERVE_MIB:
                raise DeploymentError(f"stopped: less than {RESERVE_MIB} MiB of memory were left on this machine")
            for name, mebibytes in memory_of(up).items():
                peaks[name][len(ends)] = max(peaks[name][len(ends)], mebibytes)

        summary = run_deployed(
            experiment,
            RunFolder(folder),
            up.flower,
            ray_address=up.ray_address,
            watch=watch,
            on_round=lambda settings, number, figures: ends.setdefault(number, time.monotonic()),
        )
    seconds = [ends[number] - ends[number - 1] for number in range(1, rounds + 1)]
    by_kind: dict[str, list[float]] = defaultdict(list)
    for name, by_round in peaks.items():
        by_kind[name.rstrip("0123456789").rstrip("-")].append(max(by_round.values()))
    return {
        "clients": clients,
        "rounds": rounds,
        "megabytes": megabytes,
        "lost": list(summary.lost),
        "seconds_to_start": ready - begun,
        "seconds_to_first_round": ends[0] - ready,
        "seconds_a_round": seconds,
        "peak_mib": {kind: [min(values), statistics.median(values), max(values)] for kind, values in by_kind.items()},
        "server_peak_mib_by_round": {
            name: [peaks[name][number] for number in range(1, rounds + 1)] for name in ("superlink", "serverapp")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds a round and memory of every process of a deployment.")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=0.0, help="size of the model; 0: the smallest")
    parser.add_argument("--attack", action="store_true", help="attack the copies on a Ray head of their own, too")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedattack-cost-") as folder:
        found = measure(given.clients, given.rounds, given.megabytes, attack=given.attack, folder=Path(folder))
    text = json.dumps(found, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

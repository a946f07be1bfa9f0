"""Copying costs disk, not memory: the server's peak does not grow with the number of rounds."""

import json
import subprocess
import sys

SCRIPT = """
import json, resource, sys
from pathlib import Path
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from strategies import HonestButCurious
from strategies.in_process_grid import InProcessGrid, quiet_flower

CLIENTS, ROUNDS, WEIGHTS = 10, 5, 2_000_000
folder, app, peaks = Path(sys.argv[1]), ClientApp(), []

@app.train()
def train(message, context):
    state = {name: tensor + 1 for name, tensor in message.content["arrays"].to_torch_state_dict().items()}
    metrics = MetricRecord({"num-examples": 1, "partition-id": context.node_config["partition-id"]})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

def after_round(number, arrays):
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

with quiet_flower():
    plain = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    strategy = HonestButCurious(plain, folder)
    weights = ArrayRecord({"w": torch.zeros(WEIGHTS)})
    strategy.start(InProcessGrid(app, CLIENTS), weights, num_rounds=ROUNDS, evaluate_fn=after_round)
copied = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20
print(json.dumps([peaks, copied]))
"""


def test_the_servers_memory_does_not_grow_with_the_rounds(tmp_path) -> None:
    """8 MB of weights, ten clients, five rounds: 763 MiB of copies, 305 of them after the third round, and no higher peak."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "copies")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    peaks, copied = json.loads(done.stdout.splitlines()[-1])
    assert copied > 760
    assert len(peaks) == 1 + 5
    assert peaks[5] - peaks[3] < 60

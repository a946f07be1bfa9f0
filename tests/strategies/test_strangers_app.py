"""A plain Flower app, written as a user would after the quickstart, with the three lines of the README and nothing else."""

import random
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from typer.testing import CliRunner

from fedattack.cli import app as command_line
from fedattack.metrics import psnr_db
from fedattack.store import load_reconstruction, load_update
from strategies.in_process_grid import InProcessGrid, quiet_flower


# ---------------------------------------------------------------- the stranger's app: nothing of fedattack in it
class Net(nn.Module):
    def __init__(self, image_shape=(1, 8, 8), num_classes=4):
        super().__init__()
        channels, height, width = image_shape
        self.fc1 = nn.Linear(channels * height * width, 32)
        self.fc2 = nn.Linear(32, num_classes)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


client_app = ClientApp()


@client_app.train()
def train(msg: Message, context: Context):
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    image, label = private_example(int(context.node_config["partition-id"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=msg.content["config"]["lr"])
    loss = nn.functional.cross_entropy(model(image), label)
    loss.backward()
    optimizer.step()
    metrics = MetricRecord({"train_loss": loss.item(), "num-examples": 1})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


def private_example(partition: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(partition)
    return torch.rand(1, 1, 8, 8, generator=generator), torch.tensor([partition % 4])


def first_weights() -> ArrayRecord:
    generator = torch.Generator().manual_seed(0)
    return ArrayRecord({k: 0.2 * torch.randn(v.shape, generator=generator) for k, v in Net().state_dict().items()})


def server_main(grid, copies: Path | None):
    """The body of the stranger's `@app.main()`; the added lines are numbered."""
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    if copies is not None:
        from strategies import HonestButCurious  # 1

        strategy = HonestButCurious(strategy, copies)  # 2
    return strategy.start(grid, first_weights(), num_rounds=2, train_config=ConfigRecord({"lr": 0.1}))


# ---------------------------------------------------------------- the audit
def test_three_lines_copy_everything_and_change_nothing(tmp_path) -> None:
    with quiet_flower():
        random.seed(1)
        plain = server_main(InProcessGrid(client_app, 3), None)
        random.seed(1)
        watched = server_main(InProcessGrid(client_app, 3), tmp_path / "copies")
    for name, array in plain.arrays.to_torch_state_dict().items():
        assert torch.equal(array, watched.arrays.to_torch_state_dict()[name])
    copies = sorted((tmp_path / "copies").glob("*.safetensors"))
    assert len(copies) == 6
    for path in copies:
        update, _ = load_update(path)
        assert update.kind == "weights"
        assert update.num_examples == 1
        assert update.client.startswith("node-"), "a client that says no partition id is known by its node"


def test_the_copies_are_attacked_offline(tmp_path, monkeypatch) -> None:
    """With nothing but the file, the model's class and the command line; the truth is used to score, nothing else."""
    with quiet_flower():
        server_main(InProcessGrid(client_app, 3), tmp_path / "copies")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    out = tmp_path / "out"
    for partition, node in enumerate((100, 101, 102)):
        copy = tmp_path / "copies" / f"node-{node}-round-1.safetensors"
        arguments = [
            "attack",
            str(copy),
            "-a",
            "linear-leak",
            "--model",
            "test_strangers_app:Net",
            "--image-shape",
            "1,8,8",
        ]
        result = CliRunner().invoke(
            command_line, [*arguments, "--num-classes", "4", "-k", "learning_rate=0.1", "-o", str(out)]
        )
        assert result.exit_code == 0, result.output
        found = load_reconstruction(out / "results" / f"{copy.stem}--linear-leak" / "reconstruction.safetensors")
        assert float(psnr_db(found.images.float(), private_example(partition)[0])) > 60
        assert (out / f"{copy.stem}--linear-leak-0.png").exists()


def test_the_command_says_what_the_file_does_not(tmp_path) -> None:
    with quiet_flower():
        server_main(InProcessGrid(client_app, 3), tmp_path / "copies")
    copy = tmp_path / "copies" / "node-100-round-1.safetensors"
    result = CliRunner().invoke(command_line, ["attack", str(copy), "-a", "linear-leak", "-o", str(tmp_path / "out")])
    assert result.exit_code != 0
    assert "give --model, --image-shape, --num-classes" in str(result.exception)


def test_readme_shows_these_lines() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert "from strategies import HonestButCurious" in text
    assert "strategy = HonestButCurious(strategy, " in text

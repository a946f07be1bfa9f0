"""A Grid that runs every client in this process: deterministic, no Ray, no SuperLink, milliseconds a round.

The only file that touches Flower's private names (a Grid needs a Run and a task identity to make messages).
"""

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

log = logging.getLogger("fedattack.grid")

CLIENT_FAILED = 2  # flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION
FIRST_NODE_ID = 100


class InProcessGrid(Grid):
    """`num_nodes` clients with partition ids 0 … n−1; node ids and the order of replies are always the same."""

    def __init__(
        self,
        client_app: Callable[[Message, Context], Message],
        num_nodes: int,
        *,
        node_config: Mapping[str, Any] | None = None,
        on_reply: Callable[[int, int], None] | None = None,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.client_app, self.on_reply = client_app, on_reply
        self._run = Run.create_empty(1)
        self._contexts = {
            FIRST_NODE_ID + i: Context(
                run_id=1,
                node_id=FIRST_NODE_ID + i,
                node_config={"partition-id": i, "num-partitions": num_nodes, "witness": True, **(node_config or {})},
                state=RecordDict(),
                run_config={},
            )
            for i in range(num_nodes)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the clients, lowest node id first. A client that raises gives an error reply, as everywhere in Flower."""
        ids = []
        ordered = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        for number, message in enumerate(ordered):
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            ids.append(message.metadata.message_id)
            self._replies[message.metadata.message_id] = self._answer(message)
            if self.on_reply is not None:
                self.on_reply(number + 1, len(ordered))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        try:
            return self.client_app(_delivered(message), self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            log.debug("client %s failed", message.metadata.dst_node_id, exc_info=True)
            return Message(Error(CLIENT_FAILED, f"{type(error).__name__}: {error}"), reply_to=message)


def _delivered(message: Message) -> Message:
    """What arrives at the client: records of its own, so that no client can change what another one gets."""
    content = RecordDict()
    for name, record in message.content.items():
        content[name] = type(record)(dict(record.items()))
    copy = Message(content, message.metadata.dst_node_id, message.metadata.message_type)
    copy.metadata.__dict__.update(message.metadata.__dict__)
    return copy


@contextlib.contextmanager
def quiet_flower(level: int = logging.ERROR) -> Iterator[None]:
    """Flower's own log at `level` and above inside, as before afterwards."""
    flower = logging.getLogger("flwr")
    before = flower.level
    flower.setLevel(level)
    try:
        yield
    finally:
        flower.setLevel(before)

"""The honest-but-curious server: it trains exactly as promised and keeps a copy of every client's update.

    strategy = HonestButCurious(FedAvg(), "copies/")          # around any Flower strategy, and outermost

The wrapper changes nothing that is aggregated: training with it is bit-identical to training without it, replies in the
order of their partition ids. It copies before it delegates (QFedAvg, FedMedian, FedTrimmedAvg and Bulyan empty the replies,
server-side differential privacy replaces them), never touches a global random generator, and a copy that fails is logged.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedattack.errors import FedattackError, MalformedUpdate, must
from fedattack.store import UpdateFolder
from fedattack.types import Update, UpdateKind
from strategies.inspection import inspect, to_state

log = logging.getLogger("fedattack.server")

Sink = Callable[[Update], Any]

LISTED = 5
"""Problems of one reply that are written down."""

_WRAPPED = ("configure_train", "aggregate_train", "aggregate_evaluate")


@dataclass(frozen=True)
class Incident:
    """Something in a round that a reader of the results must know: a failed client, a malformed reply, a failed copy."""

    round: int
    client: str
    problems: tuple[str, ...] = field(default_factory=tuple)


class HonestButCurious(Strategy):
    """Wrap a Flower strategy; every well-formed training reply goes to `sink` as an `Update`, then the strategy acts.

    sink: a function of one Update, or a folder into which each is written as one safetensors file. rounds, clients: copy
    only these (empty: all; clients by partition id). kind: what clients send, "weights" or "gradient"; None asks the
    strategy (FedSGD says "gradient"). on_incident: called with every malformed reply, failed client and failed copy.

    A malformed reply (NaN, wrong shape or type, missing tensor, absurd size) is reported and not copied; the strategy
    still gets it and follows its own rule. If the strategy cannot aggregate a round that holds such replies, that round
    leaves the model as it was, instead of taking the server down.
    """

    def __init__(
        self,
        strategy: Strategy,
        sink: Sink | str | Path,
        *,
        rounds: Collection[int] = (),
        clients: Collection[int] = (),
        kind: UpdateKind | None = None,
        on_incident: Callable[[Incident], Any] | None = None,
    ) -> None:
        if not isinstance(strategy, Strategy):
            raise FedattackError(must("strategy", "a flwr.serverapp.strategy.Strategy", type(strategy).__name__))
        self.strategy = strategy
        self.sink: Sink = UpdateFolder(Path(sink)) if isinstance(sink, str | Path) else sink
        self.rounds, self.clients = frozenset(rounds), frozenset(clients)
        self.kind: UpdateKind = kind or update_kind(strategy)
        self.on_incident = on_incident
        self._sent: dict[int, ArrayRecord] = {}
        self._asked: list[Metadata] = []
        self._known: dict[int, str] = {}
        # the strategy's own methods, before `start` may put ours in their place
        self._own = {name: getattr(strategy, name) for name in _WRAPPED}

    # ------------------------------------------------------------------ training
    def start(self, *args: Any, **kwargs: Any) -> Result:
        """The strategy's own `start` where it has one of its own, with our methods around its methods; else Flower's."""
        if type(self.strategy).start is Strategy.start:
            return super().start(*args, **kwargs)
        for name in _WRAPPED:
            setattr(self.strategy, name, getattr(self, name))
        try:
            return self.strategy.start(*args, **kwargs)
        finally:
            for name in _WRAPPED:
                delattr(self.strategy, name)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(self._own["configure_train"](server_round, arrays, config, grid))
        snapshots: dict[int, ArrayRecord] = {}
        self._asked = [message.metadata for message in messages]
        for message in messages:
            record = next(iter(message.content.array_records.values()), arrays)
            snapshots.setdefault(id(record), snapshot(record))
            self._sent[message.metadata.dst_node_id] = snapshots[id(record)]
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        ordered = sorted(replies, key=_order)
        malformed = self._copy_all(server_round, ordered)
        try:
            aggregated: tuple[ArrayRecord | None, MetricRecord | None] = self._own["aggregate_train"](
                server_round, ordered
            )
            return aggregated
        except Exception as error:
            if not malformed:
                raise
            self._report(server_round, "server", [f"round not aggregated: {type(error).__name__}: {error}"])
            return None, None

    # ------------------------------------------------------------------ the rest is the strategy's own business
    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The strategy's, guarded like aggregate_train: metrics that do not fit one another cost this round's figures."""
        replies = list(replies)
        try:
            figures: MetricRecord | None = self._own["aggregate_evaluate"](server_round, replies)
            return figures
        except Exception as error:
            if not _odd_ones(replies):
                raise
            self._report(server_round, "server", [f"evaluation not aggregated: {type(error).__name__}: {error}"])
            return None

    def summary(self) -> None:
        log.info("honest-but-curious copy of every update, around %s", type(self.strategy).__name__)
        self.strategy.summary()

    def __getattr__(self, name: str) -> Any:  # privacy_spent(), weighted_by_key, …
        if name == "strategy":
            raise AttributeError(name)
        return getattr(self.strategy, name)

    # ------------------------------------------------------------------ the copies
    def _copy_all(self, server_round: int, replies: list[Message]) -> bool:
        """Copy what is to be copied; True if any reply was malformed. Never raises."""
        malformed = False
        expected, odd = self._expected(replies), _odd_ones(replies)
        silent = self._silent(replies)
        seen: dict[str, int] = {}
        for reply in replies:
            client = client_of(reply)
            if reply.has_error():
                node = silent.get(id(reply))
                client = "unknown" if node is None else self._known.get(node, f"node-{node}")
            else:
                self._known[reply.metadata.src_node_id] = client
            seen[client] = seen.get(client, 0) + 1
            if seen[client] > 1:  # two nodes that claim one partition id must not overwrite each other
                client = f"{client}-again-{seen[client] - 1}"
            try:
                if reply.has_error():
                    self._report(server_round, client, [f"client failed: {reply.error.reason}"[:500]])
                    continue
                update = self._update(server_round, client, reply, expected)
                if reply.metadata.src_node_id in odd:
                    raise MalformedUpdate("metrics must be named and shaped like those of the other clients")
                if self._wanted(server_round, reply):
                    self.sink(update)
            except MalformedUpdate as problem:
                malformed = True
                self._report(server_round, client, str(problem).split("\n"))
            except Exception as error:
                self._report(server_round, client, [f"copy failed: {type(error).__name__}: {error}"])
        return malformed

    def _silent(self, replies: list[Message]) -> dict[int, int]:
        """Node of every error reply, by the reply's id(). Of a node that is gone, the SuperLink says so in its own name: the
        message that it answers names the node; where none does, and not every silent node has its error, it stays unnamed.
        """
        errors = [reply for reply in replies if reply.has_error()]
        asked = {sent.dst_node_id for sent in self._asked}
        by_message = {sent.message_id: sent.dst_node_id for sent in self._asked if sent.message_id}
        found: dict[int, int] = {}
        for reply in errors:
            node = reply.metadata.src_node_id
            if node not in asked:
                node = by_message.get(reply.metadata.reply_to_message_id, 0)
            if node:
                found[id(reply)] = node
        answered = {reply.metadata.src_node_id for reply in replies} | set(found.values())
        left = [sent.dst_node_id for sent in self._asked if sent.dst_node_id not in answered]
        unnamed = [reply for reply in errors if id(reply) not in found]
        if len(left) == len(unnamed):
            found |= {id(reply): node for reply, node in zip(unnamed, left, strict=True)}
        return found

    def _update(self, server_round: int, client: str, reply: Message, expected: Collection[str]) -> Update:
        sent = self._sent.get(reply.metadata.src_node_id)
        if sent is None:
            raise MalformedUpdate("a reply from a node that was sent nothing")
        records = list(reply.content.array_records.values())
        if len(records) != 1:
            raise MalformedUpdate(must("a reply", "exactly one ArrayRecord", len(records)))
        names = expected if self.kind == "gradient" else list(sent)
        state, problems = inspect(records[0], sent, names)
        examples, problem = num_examples_of(reply)
        problems += [problem] if problem else []
        if problems:
            raise MalformedUpdate("\n".join(problems))
        return Update(server_round, client, to_state(sent), state, self.kind, examples)

    def _wanted(self, server_round: int, reply: Message) -> bool:
        partition = partition_of(reply)
        return (not self.rounds or server_round in self.rounds) and (not self.clients or partition in self.clients)

    def _expected(self, replies: list[Message]) -> list[str]:
        """Gradients come without buffers: what at least half of this round's replies hold, every one must hold."""
        holders: dict[str, int] = {}
        answers = [reply for reply in replies if not reply.has_error()]
        for reply in answers:
            for record in reply.content.array_records.values():
                for name in record:
                    holders[name] = holders.get(name, 0) + 1
        sent = next(iter(self._sent.values()), {})
        return [name for name, count in holders.items() if 2 * count >= len(answers) and name in sent]

    def _report(self, server_round: int, client: str, problems: list[str]) -> None:
        if len(problems) > LISTED:  # training that diverged has as many as the model has tensors
            problems = [*problems[:LISTED], f"and {len(problems) - LISTED} more"]
        log.warning("round %d, %s: %s", server_round, client, "; ".join(problems))
        if self.on_incident is not None:
            try:
                self.on_incident(Incident(server_round, client, tuple(problems)))
            except Exception:
                log.exception("the incident of round %d, %s could not be recorded", server_round, client)


class EavesdroppingGrid(Grid):
    """A Grid that shows `tap(request, reply)` every pair that passes, whatever the workflow (SecAgg+'s stages too)."""

    def __init__(self, grid: Grid, tap: Callable[[Message, Message], Any]) -> None:
        self._grid, self._tap = grid, tap

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        requests = list(messages)
        by_node = {request.metadata.dst_node_id: request for request in requests}
        replies = list(self._grid.send_and_receive(requests, timeout=timeout))
        for reply in replies:
            try:
                self._tap(by_node[reply.metadata.src_node_id], reply)
            except Exception:
                log.exception("tap failed for node %s", reply.metadata.src_node_id)
        return replies

    def __getattr__(self, name: str) -> Any:
        if name == "_grid":
            raise AttributeError(name)
        return getattr(self._grid, name)


def snapshot(record: ArrayRecord) -> ArrayRecord:
    """A copy that no later aggregation can change. The payloads are immutable bytes and shared, so it costs no memory."""
    return ArrayRecord(dict(record.items()))


def update_kind(strategy: Strategy) -> UpdateKind:
    """What the clients of a strategy send: its own word, or that of the strategy it wraps, else weights."""
    inner: Any = strategy
    while inner is not None:
        if "update_kind" in vars(type(inner)):
            kind: UpdateKind = inner.update_kind
            return kind
        inner = vars(inner).get("strategy")
    return "weights"


def partition_of(reply: Message) -> int | None:
    """The partition id that a client reports about itself, if it is a sane one."""
    if reply.has_error():
        return None
    for record in reply.content.metric_records.values():
        value = record.get("partition-id")
        if isinstance(value, int) and 0 <= value < 2**31:
            return value
    return None


def client_of(reply: Message) -> str:
    """ "client-3" by partition id; "node-…" where a client does not report one."""
    partition = partition_of(reply)
    return f"node-{reply.metadata.src_node_id}" if partition is None else f"client-{partition}"


def _odd_ones(replies: list[Message]) -> set[int]:
    """Nodes whose metrics differ in names or shapes from those of most others; strategies cannot average such rounds."""
    shapes = {
        reply.metadata.src_node_id: str(
            sorted(
                (name, key, len(value) if isinstance(value, list) else 0)
                for name, record in reply.content.metric_records.items()
                for key, value in record.items()
            )
        )
        for reply in replies
        if not reply.has_error()
    }
    usual = Counter(shapes.values()).most_common(1)
    return {node for node, shape in shapes.items() if shape != usual[0][0]}


def _order(reply: Message) -> tuple[bool, int, int]:
    partition = partition_of(reply)
    return reply.has_error(), 2**31 if partition is None else partition, reply.metadata.src_node_id


def num_examples_of(reply: Message) -> tuple[int | None, str]:
    """The number of examples that a reply reports (None where it reports none), and what is wrong with it."""
    records = list(reply.content.metric_records.values())
    if len(records) != 1:
        return None, must("a reply", "exactly one MetricRecord", len(records))
    value = records[0].get("num-examples")
    if value is None:
        return None, ""
    if not isinstance(value, int | float) or not 0 < value < 2**53:
        return None, must("num-examples", "a positive count", value)
    return int(value), ""

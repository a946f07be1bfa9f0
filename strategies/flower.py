"""Flower's own strategies by name, set up for a cell: all clients take part, no federated evaluation unless asked for.

Every option of the Flower class can be given in federation.strategy_options; a typo is refused with the closest name.
"""

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedattack.config import FederationSettings
from fedattack.registry import STRATEGIES


def common_options(federation: FederationSettings, fraction_train: float = 1.0) -> dict[str, Any]:
    """A fraction of the clients in every round, all by default; utility is measured by the server on its own images."""
    return {
        "fraction_train": fraction_train,
        "fraction_evaluate": 0.0,
        "min_train_nodes": max(1, int(fraction_train * federation.clients)),
        "min_available_nodes": federation.clients,
        "min_evaluate_nodes": 0,
    }


def _plain(kind: type[Strategy], **presets: Any) -> Callable[..., Strategy]:
    def build(federation: FederationSettings, **options: Any) -> Strategy:
        return kind(**common_options(federation, float(options.get("fraction_train", 1.0))) | presets | options)

    return _documented(build, kind, set())


def qfedavg(federation: FederationSettings, **options: Any) -> Strategy:
    """Set up below; the clients' learning rate is the federation's unless another one is given."""
    presets = {"train_loss_key": "train-loss", "client_learning_rate": federation.learning_rate}
    return flower.QFedAvg(**common_options(federation, float(options.get("fraction_train", 1.0))) | presets | options)


def _private(kind: type[Strategy]) -> Callable[..., Strategy]:
    def build(federation: FederationSettings, inner: str = "fedavg", **options: Any) -> Strategy:
        wrapped = STRATEGIES.create(inner, federation=federation)
        return kind(wrapped, num_sampled_clients=federation.clients, **options)

    return _documented(
        build, kind, {"strategy", "num_sampled_clients"}, Parameter("inner", Parameter.KEYWORD_ONLY, default="fedavg")
    )


def _documented(
    build: Callable[..., Strategy], kind: type[Strategy], managed: set[str], *extra: Parameter
) -> Callable[..., Strategy]:
    """Give a factory the docstring and the options of the class it builds, so that listings and checks see them."""
    options = [
        parameter.replace(kind=Parameter.KEYWORD_ONLY)
        for name, parameter in signature(kind.__init__).parameters.items()
        if name not in managed | {"self"} and parameter.kind is not Parameter.VAR_KEYWORD
    ]
    first = Parameter("federation", Parameter.POSITIONAL_OR_KEYWORD)
    build.__signature__ = signature(build).replace(parameters=[first, *extra, *options])  # type: ignore[attr-defined]
    build.__doc__ = f"Flower's {kind.__name__}: {(kind.__doc__ or '').strip().splitlines()[0]}"
    return build


fedavg = _plain(flower.FedAvg)
fedavgm = _plain(flower.FedAvgM)
fedadam = _plain(flower.FedAdam)
fedyogi = _plain(flower.FedYogi)
fedprox = _plain(flower.FedProx)
qfedavg = _documented(
    qfedavg,
    flower.QFedAvg,
    {"client_learning_rate"},
    Parameter("client_learning_rate", Parameter.KEYWORD_ONLY, default=None),
)
fedmedian = _plain(flower.FedMedian)
fedtrimmedavg = _plain(flower.FedTrimmedAvg)
krum = _plain(flower.Krum)
multikrum = _plain(flower.MultiKrum)
bulyan = _plain(flower.Bulyan)
dp_server_fixed = _private(flower.DifferentialPrivacyServerSideFixedClipping)
dp_server_adaptive = _private(flower.DifferentialPrivacyServerSideAdaptiveClipping)
dp_client_fixed = _private(flower.DifferentialPrivacyClientSideFixedClipping)
dp_client_adaptive = _private(flower.DifferentialPrivacyClientSideAdaptiveClipping)

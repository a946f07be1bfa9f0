"""The server side: the honest-but-curious wrapper, the strategies it wraps, the attack pool and the engines."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strategies.honest_but_curious import EavesdroppingGrid, HonestButCurious

__all__ = ["STRATEGIES", "EavesdroppingGrid", "HonestButCurious"]

STRATEGIES: dict[str, str] = {
    "fedsgd": "strategies.fedsgd:fedsgd",
    "fedavg": "strategies.flower:fedavg",
    "fedavgm": "strategies.flower:fedavgm",
    "fedadam": "strategies.flower:fedadam",
    "fedyogi": "strategies.flower:fedyogi",
    "fedprox": "strategies.flower:fedprox",
    "qfedavg": "strategies.flower:qfedavg",
    "fedmedian": "strategies.flower:fedmedian",
    "fedtrimmedavg": "strategies.flower:fedtrimmedavg",
    "krum": "strategies.flower:krum",
    "multikrum": "strategies.flower:multikrum",
    "bulyan": "strategies.flower:bulyan",
    "dp-server-fixed": "strategies.flower:dp_server_fixed",
    "dp-server-adaptive": "strategies.flower:dp_server_adaptive",
    "dp-client-fixed": "strategies.flower:dp_client_fixed",
    "dp-client-adaptive": "strategies.flower:dp_client_adaptive",
}


def __getattr__(name: str) -> Any:
    """The wrapper on first use: attack workers live in this package too and need no flwr."""
    if name in ("EavesdroppingGrid", "HonestButCurious"):
        from strategies import honest_but_curious

        return getattr(honest_but_curious, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

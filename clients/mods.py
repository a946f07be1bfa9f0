"""Flower's own client mods by the names that a configuration uses. They run unchanged, around our training.

Written "name" or "name(key=value)" in federation.mods. `secaggplus` is Flower's SecAgg+, which exists in its older message
path only: the in-process and simulation engines switch to it (see clients/secagg_client.py).
"""

MODS: dict[str, str] = {
    "fixedclipping": "flwr.clientapp.mod:fixedclipping_mod",
    "adaptiveclipping": "flwr.clientapp.mod:adaptiveclipping_mod",
    "localdp": "flwr.clientapp.mod:LocalDpMod",
    "message-size": "flwr.clientapp.mod:message_size_mod",
    "arrays-size": "flwr.clientapp.mod:arrays_size_mod",
    "secaggplus": "clients.secagg_client:SecAggPlus",
}

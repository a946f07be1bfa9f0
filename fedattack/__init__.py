"""The shared language of fedattack: types, tasks, models, data, metrics, storage and the command line.

Nothing here imports flwr or ray when it is imported, so that attacks also run where only torch is installed.
"""

__version__ = "0.1.0"

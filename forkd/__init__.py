"""forkd: streams LLM answers to clients whose sockets Apache handed over.

This package is the master's side and the ground that master and workers share; `workers` is the other side.
"""

__version__ = "0.1.0"

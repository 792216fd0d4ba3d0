"""pyserve: a minimal-footprint LLM inference server. Start with `python -m pyserve`."""

__version__ = "0.1.0"
INTERRUPTED = 130  # exit code of a command that Ctrl-C has ended, as in shells: 128 + SIGINT

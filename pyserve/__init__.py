"""pyserve: a minimal-footprint LLM inference server. Start with `python -m pyserve`."""

__version__ = "0.1.0"
INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C has ended: 128 + SIGINT

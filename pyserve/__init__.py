"""pyserve: a minimal-footprint LLM inference server. Start with `python -m pyserve`."""

__version__ = "0.1.0"

"""tierkv keeps the KV of language models so that it is computed once."""

__version__ = "0.1.0"

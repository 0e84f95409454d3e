"""Understudy: fine-tune and distil language models with one recipe under any strategy."""

__all__ = ["__version__"]
__version__ = "0.1.0"

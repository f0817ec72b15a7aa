"""Teacher-guided pre-training of hierarchical video transformers from a cache."""

__version__ = "0.1.0"

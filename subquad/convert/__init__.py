"""Put a mechanism into a pretrained model (`swap`), take it out (`restore`), teach it (`distill`); another image size (`resize`)."""

from subquad.convert.size import resize

__all__ = ["resize"]

"""Attention of torch.nn in its functional form: its projections are layers of the graph, which can be masked."""

from mpcompile.capture.attention.expansion import expand_attention
from mpcompile.capture.attention.modules import is_attention

__all__ = ["expand_attention", "is_attention"]

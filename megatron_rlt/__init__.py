"""Reinforcement Learned Teachers (arXiv 2506.08388) at Megatron scale."""

__version__ = "0.1.0"

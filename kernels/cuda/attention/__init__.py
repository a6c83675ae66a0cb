"""Attention on CUDA: ``attention``, ``packed_attention``, and ``plan_attention`` for what is known of the tensors."""

from .kernel import attention, packed_attention, plan_attention

__all__ = ["attention", "packed_attention", "plan_attention"]

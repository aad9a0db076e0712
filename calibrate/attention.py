"""Attention that reads K (after its rotary embedding) and V as a cache of a few bits keeps them, per token and head.

A block switches it on by giving its attention module a ``kv_scheme``.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from calibrate.quantizer import fake_quantize_activation

IMPLEMENTATION = "sliderquant_sdpa"


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings):
    """Scaled dot-product attention; key and value [batch, heads, seqlen, head_dim]."""
    if (scheme := getattr(module, "kv_scheme", None)) is not None:
        key = fake_quantize_activation(key.float(), scheme, key.shape[-1]).to(query.dtype)
        value = fake_quantize_activation(value.float(), scheme, value.shape[-1]).to(query.dtype)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


AttentionInterface.register(IMPLEMENTATION, _attention)

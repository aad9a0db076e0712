"""Attention of the calibration. It can read K (after its rotary embedding) and V as a cache of a few bits keeps them,
per token and head: a block switches that on by giving its attention module a ``kv_scheme``.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from calibrate import products
from calibrate.quantizer import fake_quantize_activation

IMPLEMENTATION = "sliderquant_sdpa"
SHORT = 512  # tokens up to which all probabilities at once are little memory


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings):
    """Scaled dot-product attention; key and value [batch, heads, seqlen, head_dim]."""
    if (scheme := getattr(module, "kv_scheme", None)) is not None:
        key = fake_quantize_activation(key.float(), scheme, key.shape[-1]).to(query.dtype)
        value = fake_quantize_activation(value.float(), scheme, value.shape[-1]).to(query.dtype)
    if not query.is_cuda and query.shape[2] <= SHORT:
        key, value = (repeat_kv(each, module.num_key_value_groups) for each in (key, value))
        return products.attention(query, key, value, settings["scaling"]).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


AttentionInterface.register(IMPLEMENTATION, _attention)

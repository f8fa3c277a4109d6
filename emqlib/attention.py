"""Attention as four linear layers, so that its weights can be quantized like those of any other layer."""

from torch import Tensor, nn
from torch.nn import functional as F

from .checks import invalid


class MultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` with four Linear layers, `q_proj`, `k_proj`, `v_proj` and `out_proj`, in its place.

    It has the same arguments, outputs and parameters, but the fused `in_proj_weight` is split in three. So a converter
    finds every weight, and no fast path bypasses the layers. ValueError: an attention with add_bias_kv or
    add_zero_attn, or of a class derived from PyTorch's, whose own forward would be lost.
    """

    in_proj_bias = None  # nn.TransformerEncoderLayer asks for it, and without one leaves its own fast path

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if type(attention) is not nn.MultiheadAttention:
            raise invalid("net", type(attention).__name__, "nn.MultiheadAttention itself, or one of Linear layers")
        if attention.bias_k is not None or attention.add_zero_attn:
            raise invalid("net", repr(attention), "attention without add_bias_kv and add_zero_attn")
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        fused, bias = attention.in_proj_weight, attention.in_proj_bias
        weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
        weights = weights if fused is None else list(fused.chunk(3))
        biases = [None] * 3 if bias is None else list(bias.chunk(3))
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Query (B, T, E), key and value (B, S, E) to the output (B, T, E) and, if asked for, weights (B, T, S).

        Masks, also (T, E) without a batch and (T, B, E) without batch_first, as in `nn.MultiheadAttention`, whose
        is_causal is only a hint on what attn_mask holds. ValueError: the hint without the mask.
        """
        if is_causal and attn_mask is None:
            raise invalid("is_causal", True, "attn_mask with it: it is a hint on what the mask holds")
        batched, flip = query.dim() == 3, query.dim() == 3 and not self.batch_first
        if not batched:
            query, key, value = query[None], key[None], value[None]
        elif flip:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        projected = ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        q, k, v = (project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for project, x in projected)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads, weights = weights @ v, weights.mean(1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
            weights = None
        out = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out.transpose(0, 1).contiguous() if flip else out, weights

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores (B, H, T, S): 0, or minus infinity where a boolean mask is True."""
        masks = []
        if attn_mask is not None:  # (T, S), or (B H, T, S)
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads)))
        if padding is not None:  # (B, S), or (S,)
            masks.append(padding.view(-1, 1, 1, padding.shape[-1]))
        masks = [q.new_zeros(m.shape).masked_fill(m, -float("inf")) if not m.is_floating_point() else m for m in masks]
        return sum(masks[1:], masks[0]) if masks else None


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer

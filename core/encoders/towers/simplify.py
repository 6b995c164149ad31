"""What an image tower computes and nobody reads, left out: the features stay, within rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from core.numerics import unit

_SAME = 0.999999
"""Least cosine of two features that only rounding tells apart; a GPU may multiply with ten bits of a number."""


@torch.no_grad()
def make_leaner(tower: nn.Module, inputs: Float[Tensor, "n 3 h w"]) -> None:
    """Change an evaluated float32 tower in place into one that does less for the same features.

    A batch norm goes into the convolution before it; the last block of a vision transformer, of which only the class
    token is read, computes that one alone. If the features of `inputs` do not stay as they were, all is put back: what
    a tower reads is told by its results, not by its name.
    """
    before = features_of(tower, inputs)
    parts = {**_folded(tower, inputs), **_shortened(tower)}
    kept = {name: tower.get_submodule(name) for name in parts}
    _put(tower, parts)
    cosines = (unit(features_of(tower, inputs)) * unit(before)).sum(1)
    if not bool((cosines > _SAME).all()):
        _put(tower, kept)


def features_of(tower: nn.Module, inputs: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
    """Return a tower's features, without the tokens that some return beside them."""
    found = tower(inputs)
    features: Tensor = found[0] if isinstance(found, tuple) else found
    return features


class ClassTokenBlock(nn.Module):
    """The last block of a vision transformer, for the class token alone; the weights are the block's own.

    One query needs no keys and values of every token: q . (W_k n_t + b_k) = (W_k' q) . n_t + a constant, which softmax
    does not see, and sum_t a_t (W_v n_t + b_v) = W_v (sum_t a_t n_t) + b_v.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        tokens: Float[Tensor, "n t d"],
        attn_mask: None = None,  # noqa: ARG002 - as the transformer calls its blocks; it has none for pictures
    ) -> Float[Tensor, "n 1 d"]:
        """Return what the block returns for the first token."""
        block = self.block
        first = tokens[:, 0] + block.ls_1(self._attended(block.ln_1(tokens)))
        found: Tensor = first + block.ls_2(block.mlp(block.ln_2(first)))
        return found[:, None]

    def _attended(self, normed: Float[Tensor, "n t d"]) -> Float[Tensor, "n d"]:
        attn = self.block.attn
        heads = (attn.num_heads, attn.head_dim)
        w_q, w_k, w_v = attn.in_proj_weight.chunk(3)
        b_q, _, b_v = attn.in_proj_bias.chunk(3)
        query = nn.functional.linear(normed[:, 0], w_q, b_q).unflatten(1, heads)
        asked = torch.einsum("nhe,hed->nhd", query, w_k.unflatten(0, heads)) * attn.head_dim**-0.5
        shares = (asked @ normed.transpose(1, 2)).softmax(-1)
        values = torch.einsum("nhd,hed->nhe", shares @ normed, w_v.unflatten(0, heads))
        attended: Tensor = attn.out_proj(values.flatten(1) + b_v)
        return attended


def _shortened(tower: Any) -> dict[str, nn.Module]:
    """Return the last block as `ClassTokenBlock`, by its name, where it is open_clip's and the class token is read."""
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    if not blocks or getattr(tower, "pool_type", "") != "tok" or type(blocks[-1]).__name__ != "ResidualAttentionBlock":
        return {}
    return {f"transformer.resblocks.{len(blocks) - 1}": ClassTokenBlock(blocks[-1])}


def _folded(tower: nn.Module, inputs: Float[Tensor, "n 3 h w"]) -> dict[str, nn.Module]:
    """Return convolutions with the batch norms that read them, and what is left of the norms, by their names."""
    names = {module: name for name, module in tower.named_modules()}
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensors are held, so that none takes another's id
    pairs: dict[nn.Conv2d, Any] = {}

    def note(conv: nn.Module, _: Any, output: Tensor) -> None:
        made[id(output)] = (conv, output)

    def pair(norm: Any, args: tuple[Tensor, ...]) -> None:
        conv, _ = made.get(id(args[0]), (None, None))
        if isinstance(conv, nn.Conv2d) and norm.running_mean is not None:
            pairs.setdefault(conv, norm)

    hooks = [module.register_forward_hook(note) for module in names if isinstance(module, nn.Conv2d)]
    hooks += [module.register_forward_pre_hook(pair) for module in names if isinstance(module, nn.BatchNorm2d)]
    try:
        tower(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    # Not before the hooks are gone: a copy of a module copies its hooks, and would note what it makes for ever.
    parts: dict[str, nn.Module] = {}
    for conv, norm in pairs.items():
        parts[names[conv]] = fuse_conv_bn_eval(conv, norm)
        parts[names[norm]] = nn.Sequential(*norm.children())  # timm's norms hold their activation
    return parts


def _put(tower: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    for name, part in parts.items():
        tower.set_submodule(name, part)

"""How other engines lay out their KV: pools by layer and part, seen through strides. Torch only; imports no engine.

Where a token lies differs from engine to engine, and within one by release, attention backend and setting; a view of
shape `[num_pages, num_kv_heads, page_tokens, head_dim]` says all of it. A token's *slot* is page * page_tokens + offset.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

Tensor = torch.Tensor

_SHAPE = "[num_pages, num_kv_heads, page_tokens, head_dim]"


@dataclass(frozen=True, slots=True, eq=False)
class LayerPools:
    """Views of an engine's pools: per layer K and V, or the latents alone, of one shape, dtype, device and strides.

    views: per layer 2 or 1, each `[num_pages, num_kv_heads, page_tokens, head_dim]`, elements of a token and head adjacent.
    Make it once, when the engine has its pools: it keeps them alive and their addresses on the device.
    addresses: [num_layers, parts] int64.  Raises ValueError where a view is not like the first.
    """

    views: Sequence[Sequence[Tensor]]
    addresses: Tensor = field(init=False)
    is_aligned: bool = field(init=False)
    """Every address is a multiple of 16."""

    def __post_init__(self) -> None:
        parts = {len(layer) for layer in self.views}
        if parts not in ({1}, {2}):
            raise ValueError(
                f"layers of {sorted(parts)} views each: give K and V of every layer, or latents of every layer"
            )
        for number, layer in enumerate(self.views):
            for view in layer:
                _check(view, self.like, f"layer {number}")
        addresses = [[view.data_ptr() for view in layer] for layer in self.views]
        object.__setattr__(self, "addresses", torch.tensor(addresses, dtype=torch.int64, device=self.like.device))
        object.__setattr__(self, "is_aligned", all(address % 16 == 0 for layer in addresses for address in layer))

    @property
    def like(self) -> Tensor:
        """The first view: all others have its shape, dtype, device and strides."""
        return self.views[0][0]

    @classmethod
    def vllm(cls, caches: Sequence[Tensor], *, head_dim: int) -> "LayerPools":
        """See vLLM's KV caches, one tensor per layer as it hands them out: shapes are logical, strides tell NHD from HND.

        [B, H, N, 2 * head_dim]         since 0.32: K, then V, in every token; [B, 1, N, head_dim] for MLA
        [2, B, N, H, D], [B, 2, N, H, D]    before it: FlashAttention; FlashInfer and Triton.  [B, N, head_dim]: MLA
        head_dim: of K and of V, or the width of a latent.  Not for its CPU backend, which packs tokens into one another.
        """
        return cls([_vllm_views(cache, head_dim) for cache in caches])

    @classmethod
    def sglang(cls, key: Sequence[Tensor], value: Sequence[Tensor] | None = None) -> "LayerPools":
        """See SGLang's `k_buffer` and `v_buffer`, [num_slots, num_kv_heads, head_dim] per layer, or MLA's `kv_buffer` alone.

        Its pages are runs of slots, so a page of these views is one slot.
        """
        parts = (key,) if value is None else (key, value)
        return cls([tuple(part.unsqueeze(2) for part in layer) for layer in zip(*parts, strict=True)])


def _vllm_views(cache: Tensor, head_dim: int) -> tuple[Tensor, ...]:
    shape = tuple(cache.shape)
    if len(shape) == 3 and shape[2] == head_dim:
        return (cache.unsqueeze(1),)
    if len(shape) == 4 and shape[3] == head_dim:
        return (cache,)
    if len(shape) == 4 and shape[3] == 2 * head_dim:
        return cache[..., :head_dim], cache[..., head_dim:]
    if len(shape) == 5 and shape[4] == head_dim and (shape[0] == 2) != (shape[1] == 2):
        key, value = cache.unbind(0 if shape[0] == 2 else 1)
        return key.transpose(1, 2), value.transpose(1, 2)
    raise ValueError(
        f"a KV cache of shape {list(shape)} with head_dim={head_dim}: not one of vLLM's; "
        f"give its views of shape {_SHAPE} to LayerPools itself"
    )


def _check(view: Tensor, like: Tensor, name: str) -> None:
    if view.ndim != 4 or view.stride(3) != 1 or view.element_size() not in (1, 2, 4):
        raise ValueError(
            f"{name}: {view.dtype} view of shape {list(view.shape)}, strides {list(view.stride())}: "
            f"expected {_SHAPE} of 1, 2 or 4 bytes each, with the last stride 1"
        )
    if _form(view) != _form(like):
        raise ValueError(
            f"{name}: a view of {_form(view)} beside one of {_form(like)}: make one LayerPools for each kind"
        )


def _form(view: Tensor) -> list[object]:
    # The stride of an axis of one is whatever torch happened to leave there.
    strides = [stride if size > 1 else 0 for size, stride in zip(view.shape, view.stride(), strict=True)]
    return [list(view.shape), strides, view.dtype, str(view.device)]

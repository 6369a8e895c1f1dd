"""The same attention by others, on the same values: calls that return [tokens, heads, dim], one per layer measured.

Written after the sources of FlashInfer 0.7.2 and of vLLM (vllm/v1/attention/ops/triton_unified_attention.py), without a GPU to
run them on. Peers on contiguous KV do less: nothing has to be found by page.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tierkv.measure.inputs import PAGE, Paged
from tierkv.measure.lab import Lab, Tensor

Calls = list[Callable[[], Tensor]]
Prepare = Callable[[Lab, Paged], Calls]

LAYERS: Final = 2  # each far larger than L2
SEGMENTS: Final = 16  # vLLM's default number of parts of a sequence


def flashinfer(lab: Lab, paged: Paged, *, tensor_cores: bool) -> Calls:
    wrapper = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    model, batch = paged.model, paged.batch
    lengths = [length for _, _, length in batch.spans]
    counts = torch.tensor([-(-length // PAGE) for length in lengths])
    indices = torch.cat([row[:count] for row, count in zip(batch.tables, counts.tolist(), strict=True)])
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).to(torch.int32)
    last = torch.tensor([(length - 1) % PAGE + 1 for length in lengths], dtype=torch.int32)
    workspace = torch.zeros(512 << 20, dtype=torch.uint8, device=lab.device)
    decode = wrapper(workspace, "HND", use_tensor_cores=tensor_cores)
    decode.plan(
        indptr.to(lab.device), indices, last.to(lab.device), model.heads, model.kv_heads, model.dim, PAGE,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16, sm_scale=model.scale,
    )  # fmt: skip
    queries = [query.transpose(0, 1).contiguous() for query in paged.query]
    return [
        partial(decode.run, queries[number % len(queries)], paged.layer(number)[0])
        for number in range(min(8, paged.layers))
    ]


def vllm(lab: Lab, paged: Paged) -> Calls:
    unified = import_module("vllm.v1.attention.ops.triton_unified_attention").unified_attention
    batch, model, num_seqs = paged.batch, paged.model, len(paged.batch.spans)
    width = 1 << (model.dim - 1).bit_length()
    segments = [
        torch.empty((num_seqs, model.heads, SEGMENTS, *last), dtype=torch.float32, device=lab.device)
        for last in ((width,), (), ())
    ]
    calls: Calls = []
    for number in range(min(LAYERS, paged.layers)):
        key, value = (part.transpose(1, 2).contiguous() for part in paged.layer(number)[0].unbind(1))
        query = paged.query[number % len(paged.query)].transpose(0, 1).contiguous()
        out = torch.empty_like(query)
        run = partial(
            unified, query, key, value, out, batch.cu_seqlens, 1, batch.lengths, max(span[2] for span in batch.spans),
            model.scale, True, (-1, -1), batch.tables, 0.0, None, None, None,
            seq_threshold_3D=128 // model.kv_heads, num_par_softmax_segments=SEGMENTS,
            softmax_segm_output=segments[0], softmax_segm_max=segments[1], softmax_segm_expsum=segments[2],
        )  # fmt: skip
        calls.append(lambda run=run, out=out: (run(), out)[1])
    return calls


def sdpa(lab: Lab, paged: Paged) -> Calls:
    return _contiguous(
        paged, lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=paged.model.scale, enable_gqa=True)
    )


def flex(lab: Lab, paged: Paged) -> Calls:
    from torch.nn.attention.flex_attention import flex_attention

    run = flex_attention if lab.rehearsing else torch.compile(flex_attention, dynamic=False)
    return _contiguous(paged, lambda q, k, v: run(q, k, v, scale=paged.model.scale, enable_gqa=True))


def _contiguous(paged: Paged, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Calls:
    if len({length for _, _, length in paged.batch.spans}) > 1:
        return []
    calls: Calls = []
    for number in range(min(LAYERS, paged.layers)):
        states = [paged.contiguous(number, sequence).to(torch.bfloat16) for sequence in range(len(paged.batch.spans))]
        key, value = torch.stack(states, dim=1)
        query = paged.query[number % len(paged.query)].transpose(0, 1).unsqueeze(2).contiguous()
        calls.append(lambda q=query, k=key, v=value: attend(q, k, v).squeeze(2))
    return calls


DECODE: Final[dict[str, tuple[str, Prepare]]] = {
    "FlashInfer": ("flashinfer", partial(flashinfer, tensor_cores=False)),
    "FlashInfer, tensor cores": ("flashinfer", partial(flashinfer, tensor_cores=True)),
    "vLLM unified attention": ("vllm", vllm),
    "torch sdpa, contiguous": ("torch", sdpa),
    "torch flex_attention, contiguous": ("torch", flex),
}


def present(lab: Lab) -> dict[str, Prepare]:
    """Those that are installed; a row for each that is not."""
    found = {}
    for name, (module, prepare) in DECODE.items():
        if find_spec(module):
            found[name] = prepare
        else:
            lab.absent(f"decode against {name}", f"{module} is not installed")
    return found


def prefill(lab: Lab, paged: Paged, backend: SDPBackend, *, grouped: bool) -> Calls:
    """torch sdpa on contiguous KV of the one sequence; the last query sees the last key.

    grouped: K and V as they are, with enable_gqa; else expanded to every query head beforehand.
    """
    from torch.nn.attention.bias import causal_lower_right

    (_, count, length), group = paged.batch.spans[0], paged.model.heads // paged.model.kv_heads
    calls: Calls = []
    for number in range(min(LAYERS, paged.layers)):
        key, value = paged.contiguous(number, 0).to(torch.bfloat16).unsqueeze(1)
        if not grouped:
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        query = paged.query[number % len(paged.query)].unsqueeze(0).contiguous()
        mask = None if count == length else causal_lower_right(count, length)
        run = partial(
            scaled_dot_product_attention, query, key, value, attn_mask=mask, is_causal=mask is None,
            scale=paged.model.scale, enable_gqa=grouped,
        )  # fmt: skip
        calls.append(partial(_within, backend, run))
    return calls


def _within(backend: SDPBackend, run: Callable[[], Tensor]) -> Tensor:
    with sdpa_kernel(backend):
        return run()[0].transpose(0, 1)

"""What only moves or recodes KV: page writes, page copies, gather and scatter, quantisation. The limit is a copy's bandwidth."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, Final

import torch

from tierkv.measure.inputs import LLAMA, PAGE, TINY, Paged
from tierkv.measure.lab import Call, Lab, Tensor

GOAL_WRITE: Final = 0.8
GOAL_BLOCKS: Final = 0.85
GOAL_QUANT: Final = 0.8
SETS: Final = 4  # of inputs, in turn


def run(lab: Lab) -> None:
    """Measure all of them."""
    for tokens in lab.pick((8192, 64), (20,)):
        for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
            name = f"write_kv {tokens} tokens into {_short(dtype)}"
            with lab.attempt(name):
                write(lab, name, tokens, dtype)
    with lab.attempt("copy_pages"):
        copy(lab, lab.pick(256, 2))
    for count in lab.pick((64, 512), (2,)):
        with lab.attempt(f"gather and scatter {count} blocks"):
            blocks(lab, count)
    for name, group in (("fp8", None), ("int8", None), ("int4", (PAGE, 1)), ("int4", (1, 32))):
        with lab.attempt(f"quantise {name}"):
            quantise(lab, name, group, lab.pick(1 << 16, 8))


def write(lab: Lab, name: str, tokens: int, dtype: torch.dtype) -> None:
    """New tokens into pages."""
    model = lab.pick(LLAMA, TINY)
    paged = Paged(lab, model, [tokens], queries=[tokens], dtype=dtype)
    run = lab.kernel("pages", "write_kv")
    states = (
        torch.randn((SETS, 2, tokens, model.kv_heads, model.dim), device=lab.device).to(torch.bfloat16).transpose(2, 3)
    )
    calls: list[Call] = []
    for number in range(min(SETS, paged.layers)):
        pages, scales = paged.layer(number)
        calls.append(partial(run, *states[number], pages, paged.batch, scales=scales))
    calls[0]()
    worst = {torch.bfloat16: 0.0, torch.int8: 0.01, torch.float8_e4m3fn: 0.05}[dtype]
    error = relative(paged.contiguous(0, 0), states[0].double())
    if not error <= worst:
        raise ArithmeticError(f"what was read back is {error:.2g} from what was written")
    read = states[0].nbytes
    written = tokens * model.token_bytes(dtype)
    limit = (read + written) / lab.copy_seconds((read + written) // 2, SETS) / 1e9
    speed(lab, name, calls, read + written, GOAL_WRITE, limit=limit, limit_name="copy of as many bytes", error=error)


def copy(lab: Lab, count: int) -> None:
    """Pages to other pages."""
    model = lab.pick(LLAMA, TINY)
    layers = lab.pick(32, 2)
    shape = (2 * count, layers, 2, model.kv_heads, PAGE, model.dim)
    pool = torch.empty(shape, dtype=torch.bfloat16, device=lab.device).normal_()
    order = torch.randperm(2 * count).tolist()
    sources, targets = order[:count], order[count:]
    run = lab.kernel("pages", "copy_pages")
    run(pool, sources, targets)
    exact(pool[targets], pool[sources])
    speed(lab, f"copy_pages, {count} pages", [partial(run, pool, sources, targets)] * SETS, pool.nbytes, None)


def blocks(lab: Lab, count: int) -> None:
    """Between vLLM's NHD pools and contiguous blocks."""
    pools_of = import_module("tierkv.kernels.layers").LayerPools
    model = lab.pick(LLAMA, TINY)
    layers, num_pages = lab.pick(32, 2), lab.pick(2048, 9)
    caches = [
        torch.empty((2, num_pages, PAGE, model.kv_heads, model.dim), dtype=torch.bfloat16, device=lab.device).normal_()
        for _ in range(layers)
    ]
    pools = pools_of.vllm(caches, head_dim=model.dim)
    shape = (count, layers, 2, model.kv_heads, PAGE, model.dim)
    targets = [torch.empty(shape, dtype=torch.bfloat16, device=lab.device).normal_() for _ in range(SETS)]
    pages = [torch.randperm(num_pages, device=lab.device)[:count] for _ in range(SETS)]
    slots = [(page[:, None] * PAGE + torch.arange(PAGE, device=lab.device)) for page in pages]
    gather, scatter = lab.kernel("pages", "gather_blocks"), lab.kernel("pages", "scatter_blocks")

    gather(pools, slots[0], targets[0])
    for layer in (0, layers - 1):
        exact(targets[0][:, layer], caches[layer][:, pages[0]].permute(1, 0, 3, 2, 4))
    scatter(targets[1], pools, slots[1])
    for layer in (0, layers - 1):
        exact(targets[1][:, layer], caches[layer][:, pages[1]].permute(1, 0, 3, 2, 4))

    num_bytes, sets = 2 * targets[0].nbytes, list(zip(slots, targets, strict=True))
    speed(lab, f"gather {count} blocks", [partial(gather, pools, s, b) for s, b in sets], num_bytes, GOAL_BLOCKS)
    speed(lab, f"scatter {count} blocks", [partial(scatter, b, pools, s) for s, b in sets], num_bytes, GOAL_BLOCKS)


def quantise(lab: Lab, name: str, group: tuple[int, int] | None, num_tiles: int) -> None:
    """Tiles to codes and back."""
    options: dict[str, Any] = {} if group is None else {"group": group}
    label = name if group is None else f"{name} in groups of {group[0]} x {group[1]}"
    encode, decode = lab.kernel("quant", f"encode_{name}"), lab.kernel("quant", f"decode_{name}")
    model = lab.pick(LLAMA, TINY)
    tiles = [torch.randn((num_tiles, PAGE, model.dim), device=lab.device).to(torch.bfloat16) for _ in range(SETS)]
    codes = [encode(some, **options) for some in tiles]
    restored = decode(*codes[0], **options, dtype=torch.bfloat16)

    # Bit for bit what the reference makes, on some of the tiles.
    module = import_module("tierkv.kernels.quant")
    some = tiles[0][:64].cpu()
    expected = getattr(module, f"encode_{name}")(some, **options)
    for one, other in zip(codes[0], expected, strict=True):
        exact(one[:64], other)
    exact(restored[:64], getattr(module, f"decode_{name}")(*expected, **options, dtype=torch.bfloat16))

    num_bytes = tiles[0].nbytes + sum(part.nbytes for part in codes[0])
    error = relative(restored.double(), tiles[0].double())
    encoding = [partial(encode, some, **options) for some in tiles]
    decoding = [partial(decode, *parts, **options, dtype=torch.bfloat16) for parts in codes]
    speed(lab, f"encode {label}", encoding, num_bytes, GOAL_QUANT, error=error)
    speed(lab, f"decode {label}", decoding, num_bytes, GOAL_QUANT)


def speed(
    lab: Lab,
    name: str,
    calls: Sequence[Callable[[], Any]],
    num_bytes: int,
    goal: float | None,
    *,
    limit: float | None = None,
    limit_name: str = "copy",
    **more: Any,  # columns of some rows only
) -> None:
    """The row of calls that read and write `num_bytes` each."""
    timing = lab.time(calls)
    limit = limit or lab.copy_gbps()
    value = num_bytes / timing.seconds / 1e9
    more |= {"rounds": timing.rounds, "graph": timing.graph}
    lab.add(name, value, "GB/s", limit_name=limit_name, limit=limit, goal=goal, **more)


def exact(one: Tensor, other: Tensor) -> None:
    """Raise unless both are the same bytes."""
    if not torch.equal(*(tensor.cpu().contiguous().view(torch.uint8) for tensor in (one, other))):
        raise ArithmeticError("wrong: not the bytes of the reference")


def relative(out: Tensor, reference: Tensor) -> float:
    """‖out − reference‖ / ‖reference‖."""
    return float((out - reference).norm() / reference.norm())


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8", torch.int8: "int8"}[dtype]

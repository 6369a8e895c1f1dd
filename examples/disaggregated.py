"""Prefill in one process, decode in another: the prompt's KV goes through a cache daemon while it is still being computed.

python examples/disaggregated.py

Both engines, and the single process they are compared with, get one thread each and compute in float32: tokens can be compared.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.resources import files
from typing import Any

import tierkv
from tierkv.config import Config, DaemonConfig, DeviceConfig, EngineConfig, HostConfig, TransferConfig

DOCUMENT = (files("tierkv") / "data" / "demo_document.md").read_text(encoding="utf-8")
QUESTION = "In one short paragraph: what does this text say must be done first, and why?"


def engine(role: str, url: str, groups: int) -> None:
    """A process of its own: serve the prompt once, and print what happened when. Clocks are those of the machine."""
    from tierkv.engine import SamplingParams

    config = Config(
        device=DeviceConfig(kind="cpu", capacity="512MiB"),
        host=HostConfig(capacity="1GiB"),
        daemon=DaemonConfig(url=url or None, name=role),
        transfer=TransferConfig(layer_groups=groups),
        engine=EngineConfig(dtype="float32", num_threads=1),
    )
    with tierkv.open_engine("smollm2", config) as (engine, store):
        engine.generate("Warm up.", SamplingParams(max_tokens=2))
        prompt = engine.chat_prompt([{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}])
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.monotonic()
        params = SamplingParams(max_tokens=1 if role == "prefill" else 32)
        engine.add(prompt, params, await_prefix_s=120 if role == "decode" else None)
        tokens: list[int] = []
        first, stats, came = 0.0, None, [(began, 0)]
        while engine.has_work:
            for output in engine.step():
                first = first or time.monotonic()
                tokens += output.token_ids
                stats = output.stats or stats
            if (blocks := int(store.metrics.blocks_prefetched.value("daemon"))) > came[-1][1]:
                came.append((time.monotonic(), blocks))
        sources = dict(stats.sources) if stats else {}
        told = {
            "tokens": tokens,
            "began": began,
            "first": first,
            "came": came,
            "sources": sources,
            "blocks": len(prompt) // 16,
        }
    print(json.dumps(told), flush=True)


@contextmanager
def process(*args: str) -> Iterator["subprocess.Popen[str]"]:
    """A child that does not outlive this process, whatever ends it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield child
    finally:
        child.terminate()
        child.communicate()


def said(child: "subprocess.Popen[str]", beginning: str) -> str:
    """Wait until the child prints a line that begins so."""
    for line in child.stdout or ():
        if line.startswith(beginning):
            return line
    raise SystemExit(f"{child.args} ended early")


def run(groups: int, url: str, *roles: str) -> list[dict[str, Any]]:
    """Start engines, let them go at the same moment, and collect what they tell."""
    with ExitStack() as children:
        engines = [children.enter_context(process(sys.executable, __file__, role, url, str(groups))) for role in roles]
        for child in engines:
            said(child, "ready")
        for child in engines:
            print("go", file=child.stdin, flush=True)
        return [json.loads(said(child, "{")) for child in engines]


def main() -> None:
    (alone,) = run(1, "", "alone")
    cold_s = alone["first"] - alone["began"]
    print(f"{alone['blocks'] * 16} prompt tokens; one process alone, cold: first token after {cold_s:.2f} s")
    for groups in (1, 6):
        with tempfile.TemporaryDirectory() as folder:
            url = f"unix://{folder}/daemon.sock"
            command = (sys.executable, "-m", "tierkv.cli", "daemon", "--listen", url, "--http", "off")
            with process(*command, "--set", "host.capacity=2GiB") as daemon:
                said(daemon, "tierkv daemon: listens on")
                prefill, decode = run(groups, url, "prefill", "decode")
        moved = max(blocks for at, blocks in decode["came"] if at <= prefill["first"]) / decode["blocks"]
        print(
            f"layer groups {groups}: first token {decode['first'] - decode['began']:.2f} s after the request,"
            f" {1e3 * (decode['first'] - prefill['first']):.0f} ms after the end of prefill; {moved:.0%} of the KV had moved"
            f" by then; from {decode['sources']}; tokens identical: {'yes' if decode['tokens'] == alone['tokens'] else 'NO'}"
        )


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        if len(sys.argv) == 4:
            engine(sys.argv[1], sys.argv[2], int(sys.argv[3]))
        else:
            main()

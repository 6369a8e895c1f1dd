"""A chat whose context is on disk: run it twice, and the second run reads the document's KV instead of computing it.

python examples/chat_across_restarts.py "Who keeps the light?"
"""

import sys
from importlib.resources import files

import tierkv
from tierkv.config import Config, DiskConfig
from tierkv.engine import SamplingParams

document = (files("tierkv") / "data" / "demo_document.md").read_text(encoding="utf-8")
question = " ".join(sys.argv[1:]) or "What is this text about?"

with tierkv.open_engine("smollm2", Config(disk=DiskConfig(path="example-kv", capacity="2GiB"))) as (engine, _):
    output = engine.chat([{"role": "user", "content": f"{document}\n\n{question}"}], SamplingParams(max_tokens=64))
    print(output.text)
    print(f"first token after {output.stats.ttft_s:.2f} s; prompt tokens by source: {dict(output.stats.sources)}")

"""Two processes, one Redis: what the first computed, the second finds. Starts a private Valkey server for the occasion.

python examples/two_processes.py
"""

import subprocess
import sys

import tierkv
from tierkv.config import Config, RedisConfig
from tierkv.engine import SamplingParams
from tierkv.valkey import EmbeddedValkey

RULES = "You answer for a small harbour office. " + "Be brief, name the pier, and never promise a berth. " * 40


def ask(url: str, question: str) -> None:
    with tierkv.open_engine("smollm2", Config(redis=RedisConfig(url=url, ttl_s=3600))) as (engine, _):
        messages = [{"role": "system", "content": RULES}, {"role": "user", "content": question}]
        output = engine.chat(messages, SamplingParams(max_tokens=24))
        print(f"{question}\n  {output.text.strip()}")
        print(f"  first token after {output.stats.ttft_s:.2f} s, prompt from {dict(output.stats.sources)}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        ask(*sys.argv[1:])
    else:
        with EmbeddedValkey() as server:
            for question in ("Is there room for a sailing boat tonight?", "Where do I pay?"):
                subprocess.run([sys.executable, __file__, server.url, question], check=True)

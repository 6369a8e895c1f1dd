"""`python -m bench.warm [--rounds N] [--only NAME …] [--json PATH]`: what warming costs, and what a mounted pack saves.

    throughput   `tierkv warm` into a disk tier, against the bundled engine's own prefill of the same batch, in turns
    kills        a folder warmed, killed with -9 twice, resumed: tokens computed in all, and what the store holds
    ttft         first request after a 3,000-token handbook: cold, warm store, mounted pack, through a daemon, over S3

SmolLM2, two threads. Some 3 GiB of memory and of disk, about a minute per round.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.warm import kills, throughput, ttft

PARTS = {"throughput": throughput.run, "kills": kills.run, "ttft": ttft.run}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.warm", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="NAME", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=2, help="of the model (2)")
    parser.add_argument("--json", type=Path, help="write the rows to a file")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tierkv-bench-") as folder:
        for name in options.only or PARTS:
            made = PARTS[name](Path(folder), rounds=options.rounds, threads=options.threads)
            rows += made
            for row in made:
                limit = (
                    ""
                    if row["limit"] is None
                    else f"  {row['limit_name']} {row['limit']:.4g}, ratio {row['ratio']:.3f}"
                )
                print(f"{row['name']:<46} {row['value']:>10.4g} {row['unit']:<6}{limit}", flush=True)
    if options.json:
        from bench.conftest import machine

        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

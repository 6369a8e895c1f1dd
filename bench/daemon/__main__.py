"""`python -m bench.daemon [--rounds N] [--only NAME …] [--json PATH]`: tierkv's daemon, its peers, and what the machine allows.

All parties in one run, in turns (`rounds.py`); who is not installed is a line, not an error. Exit status 1 when a party
failed. Some 3 GiB of memory, and about 10 s per round for all.
"""

import argparse
import json
import sys
from pathlib import Path

from bench.daemon.parties import PARTIES
from bench.daemon.report import rows, tables
from bench.daemon.rounds import run


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.daemon", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count (9)")
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTIES), metavar="NAME", help=f"some of: {', '.join(PARTIES)}"
    )
    parser.add_argument("--json", type=Path, help="write the rows to a file")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    results = run([PARTIES[name] for name in options.only or PARTIES], rounds=options.rounds)
    print("\n".join(tables(results)))
    if options.json:
        from bench.conftest import machine  # it needs pytest, which a run without --json does not

        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows(results)}, indent=1) + "\n")
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

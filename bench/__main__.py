"""`python -m bench [SUITE …] [--json PATH]`: run the suites of this folder (all, or by name: keys, index, disk …)."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    names = [word for word in arguments if (HERE / f"bench_{word}.py").exists()]
    options = [word for word in arguments if word not in names]
    suites = [str(HERE / f"bench_{name}.py") for name in names] or sorted(map(str, HERE.glob("bench_*.py")))
    # pyproject's options are the tests'; a benchmark is a pytest-benchmark suite with its own.
    base = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-enable",
        "--benchmark-disable-gc",
        "--benchmark-columns=median,iqr,rounds",
    ]
    return int(pytest.main([*base, *suites, *options]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Who takes part: name, kind, where its class is, and which Python runs its user."""

import importlib
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from bench.daemon.party import Party

ROOT: Final = Path(__file__).parents[2]
MOONCAKE_INSTALL: Final = (
    "python3 -m venv .venv-mooncake && .venv-mooncake/bin/pip install mooncake-transfer-engine-non-cuda==0.3.13.post1 numpy,"
    " and Debian's libibverbs1 librdmacm1 libnuma1"
)
_MOONCAKE: Final = ROOT / ".venv-mooncake" / "bin" / "python"


class Kind(StrEnum):
    """What a party is compared as."""

    LIMIT = "limit"
    PEER = "peer"
    OURS = "ours"


@dataclass(frozen=True, slots=True)
class Entry:
    """A party before it is loaded. python: the interpreter of its user.  install: what to do where that is not there."""

    name: str
    kind: Kind
    place: str
    python: Path = Path(sys.executable)
    install: str = ""

    def load(self) -> type[Party]:
        """Import its class; only the user's process does."""
        module, _, name = self.place.partition(":")
        found: type[Party] = getattr(importlib.import_module(f"bench.daemon.{module}"), name)
        return found


ENTRIES: Final = (
    Entry("memcpy", Kind.LIMIT, "limits:Memcpy"),
    Entry("shm in place", Kind.LIMIT, "limits:ShmInPlace"),
    Entry("shm both copies", Kind.LIMIT, "limits:ShmBothCopies"),
    Entry("bare unix", Kind.LIMIT, "limits:BareUnix"),
    Entry("bare tcp", Kind.LIMIT, "limits:BareTcp"),
    Entry("redis", Kind.PEER, "rivals:Redis"),
    Entry("mooncake", Kind.PEER, "mooncake:MooncakeTcp", _MOONCAKE, MOONCAKE_INSTALL),
    Entry("mooncake local", Kind.PEER, "mooncake:MooncakeLocal", _MOONCAKE, MOONCAKE_INSTALL),
    Entry("mooncake pool", Kind.PEER, "mooncake:MooncakePool", _MOONCAKE, MOONCAKE_INSTALL),
    Entry("tierkv", Kind.OURS, "ours:Tierkv"),
    Entry("tierkv tcp", Kind.OURS, "ours:TierkvTcp"),
)
"""In the order of their turns."""
PARTIES: Final = {entry.name: entry for entry in ENTRIES}

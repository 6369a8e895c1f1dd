"""tierkv keeps the KV of language models so that it is computed once.

Public names; each is imported when it is first used, so that `import tierkv` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tierkv.assembly import open_engine, open_store
    from tierkv.config import Config
    from tierkv.errors import TierKVError
    from tierkv.keys import Namespace
    from tierkv.layout import Layout
    from tierkv.metrics import Metrics
    from tierkv.store import Store

__version__ = "0.1.0"

__all__ = ["Config", "Layout", "Metrics", "Namespace", "Store", "TierKVError", "open_engine", "open_store"]

_HOMES = {
    "Config": "config",
    "Layout": "layout",
    "Metrics": "metrics",
    "Namespace": "keys",
    "Store": "store",
    "TierKVError": "errors",
    "open_engine": "assembly",
    "open_store": "assembly",
}


def __getattr__(name: str) -> Any:  # Any: whatever the name stands for
    if name not in _HOMES:
        raise AttributeError(f"module 'tierkv' has no attribute {name!r}")
    return getattr(import_module(f"tierkv.{_HOMES[name]}"), name)

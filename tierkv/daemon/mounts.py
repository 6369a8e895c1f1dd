"""The packs that answer one pool, and the names under which they do; they may be exchanged while clients are served."""

import logging
from collections.abc import Callable
from typing import Final

from tierkv.building import each_pack, shard_of
from tierkv.config import Config
from tierkv.errors import PackError
from tierkv.keys import Key, Namespace
from tierkv.layout import Layout
from tierkv.tiers.pack import PackTier, Shard

MAX_READERS: Final = 256
"""Namespaces that clients who may only read can have looked for in packs: a name costs memory for every block."""
log = logging.getLogger("tierkv")


def layouts_of(config: Config) -> list[tuple[Shard, Layout]]:
    """Layouts of the packs that are configured, and which part of them is wanted. Raises ConfigError or PackError."""
    layouts = []
    for pack in each_pack(config):
        with pack:
            layouts.append((shard_of(config), pack.layout))
    return layouts


class Mounts:
    """Thread-safe where it says so: packs are opened, and namespaces introduced, off the server's loop.

    opens: makes the tier of a configuration, or none.
    """

    def __init__(self, opens: Callable[[Config], PackTier | None]) -> None:
        self._opens = opens
        self.tier: PackTier | None = None
        self._known: dict[Key, Namespace] = {}
        self._readers: set[Key] = set()

    def open_first(self, config: Config) -> PackTier | None:
        """As `open`; packs that were sound when the daemon started and are not now are told of, and done without."""
        try:
            return self.open(config)
        except PackError as error:
            log.warning("no pack is mounted until the next reload (SIGHUP): %s", error)
            return None

    def open(self, config: Config) -> PackTier | None:
        """The packs of a configuration, under every name that is known here. Off the loop. Raises ConfigError or PackError."""
        tier = self._opens(config)
        if tier:
            self._tell(tier)
        return tier

    def exchange(self, tier: PackTier | None) -> PackTier | None:
        """Answer from these from now on; returns those before, to be closed off the loop."""
        old, self.tier = self.tier, tier
        if tier:
            self._tell(tier)  # what was introduced since they were opened
        return old

    def _tell(self, tier: PackTier) -> None:
        for root, namespace in list(self._known.items()):
            self._introduce(tier, root, namespace)

    def introduce(self, root: Key, namespace: Namespace) -> None:
        """Blocks of this namespace may be asked for, by a client who may write: its word is taken. From any thread."""
        self._known[root] = namespace
        if self.tier:
            self._introduce(self.tier, root, namespace)

    def introduce_reader(self, root: Key, namespace: Namespace) -> None:
        """The same for one who may only read: its root must be what it says, which no secret hides. From any thread."""
        fits = self.tier and any(self.tier.mismatch(pack, namespace) is None for pack in self.tier.packs)
        if root in self._known or namespace.root() != root or not fits:
            return
        if len(self._readers) >= MAX_READERS:
            log.warning("packs answer %d namespaces of clients that may only read, and no more", MAX_READERS)
            return
        self._readers.add(root)
        self.introduce(root, namespace)

    @staticmethod
    def _introduce(tier: PackTier, root: Key, namespace: Namespace) -> None:
        if tier.knows(root):
            return
        tier.introduce(root, namespace)
        for pack in tier.packs:
            if differs := tier.mismatch(pack, namespace):
                log.warning("pack %s is not for model %s: %s", pack.place, namespace.model, differs)

"""What a client may ask for, operation by operation; see ARCHITECTURE.md for what goes over the wire."""

import json
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, ClassVar, Final

import numpy as np

from tierkv import __version__
from tierkv.daemon.access import Role
from tierkv.daemon.events import encode
from tierkv.daemon.loans import Lent, Sought, Writing
from tierkv.daemon.pool import Pool
from tierkv.daemon.protocol import (
    LOANS,
    MAX_HEADER_BYTES,
    MAX_KEYS,
    MAX_PAYLOAD_BYTES,
    MAX_REQUEST_BYTES,
    VERSION,
    Limits,
    Message,
    Op,
    State,
)
from tierkv.daemon.session import Held, Session
from tierkv.errors import LayoutError, ProtocolError, RefusedError
from tierkv.keys import KEY_BYTES, Key, Namespace
from tierkv.layout import TOKEN_BYTES, Layout

REPORT_BYTES: Final = 64 << 20
"""Looked at for one REPORT, while others wait; more are found when they are read next."""


class Operations(Session):
    """A session that answers."""

    def _pool(self, message: Message) -> Pool:
        number = message.fields["pool"]
        pool = self.service.pools.get(number)
        if pool is None or self.client is None or number not in self.client.uses:
            raise RefusedError(f"pool {number} is none that this client has attached to: attach first")
        return pool

    @staticmethod
    def _keys(message: Message) -> bytes:
        keys = bytes(message.payload or b"")
        if len(keys) % KEY_BYTES or len(keys) > MAX_KEYS * KEY_BYTES:
            raise ProtocolError(
                f"{message.op.name} with {len(keys)} bytes of keys: up to {MAX_KEYS} of {KEY_BYTES} bytes"
            )
        return keys

    def hello(self, message: Message) -> dict[str, Any]:
        """Introduce the client."""
        fields = message.fields
        if self.client is not None:
            raise ProtocolError("HELLO twice")
        self.token = fields["token"]
        self.role = self.service.tokens.role(self.token, self.peer)
        if self.role is None:
            self.stream.loop.call_soon(self.stream.finish, "an unknown token")
            raise RefusedError("a token is needed here, and this is none of ours: see daemon.token_file", kind="token")
        if any(number >= fields["connection"] for number in fields["ended"]):
            raise ProtocolError("HELLO with connections that have ended before they began")
        self.number = fields["connection"]
        self.wants_memory = "memory" in fields["wants"] and self.peer.address == "unix"
        self.client = self.service.welcome(self, fields)
        self.stream.incoming.limits = Limits(payload=MAX_REQUEST_BYTES, filled=MAX_PAYLOAD_BYTES)
        return {
            "version": VERSION,
            "release": __version__,
            "instance": self.service.instance,
            "role": self.role.name.lower(),
            "memory": self.wants_memory,
            "max_keys": MAX_KEYS,
            "max_payload": MAX_PAYLOAD_BYTES,
        }

    async def attach(self, message: Message) -> dict[str, Any]:
        """Give access to the blocks of a layout, by shared memory if that can be."""
        fields = message.fields
        try:
            layout, namespace = Layout(**fields["layout"]), dict(fields["namespace"])
            named = Namespace(str(namespace["model"]), layout, str(namespace["adapter"]), str(namespace["tenant"]))
        except (LayoutError, TypeError, KeyError) as error:
            raise RefusedError(f"a layout or namespace that is none: {error}") from None
        assert self.client
        writes = self.role is not None and self.role >= Role.WRITE
        pool = await self.service.attach(self.client, layout, device_bytes=fields["device_bytes"], opens=writes)
        if writes:
            await self.service.off_loop(partial(pool.introduce, Key(fields["root"]), named))
        else:
            await self.service.off_loop(partial(pool.mounts.introduce_reader, Key(fields["root"]), named))
        # Whose end nobody would hear of is not let write in memory itself: it may go on to do so after its connection is lost.
        writable = writes and self.client.watched is not None
        reply: dict[str, Any] = {
            "pool": pool.number,
            "places": pool.slab.num_places,
            "lease_blocks": self._limit(pool),
            "block_bytes": layout.block_bytes,
            "writable": writable,
            "memory": bool(fields["memory"] and self.wants_memory),
        }
        if reply["memory"]:
            reply["fds"] = (pool.slab.fd if writable else pool.slab.reader_fd,)
            self.client.mapped = self.client.mapped or writable
        return reply

    def ping(self, message: Message) -> dict[str, Any]:
        """Nothing but an answer."""
        return {}

    def contains(self, message: Message) -> dict[str, Any] | Coroutine[Any, Any, dict[str, Any]]:
        """Which keys are held: a byte each, as in `Pool.presence`."""
        return {"payload": [memoryview(self._pool(message).presence(self._keys(message)))]}

    def seek(self, message: Message) -> dict[str, Any] | Coroutine[Any, Any, dict[str, Any]]:
        """Look up a request. Payload: keys, then their tokens."""
        pool, fields = self._pool(message), message.fields
        whole = bytes(message.payload or b"")
        step = KEY_BYTES + pool.layout.block_tokens * TOKEN_BYTES
        count, rest = divmod(len(whole), step)
        if rest or count > MAX_KEYS:
            raise ProtocolError(
                f"SEEK with {len(whole)} bytes: {KEY_BYTES} of key and {step - KEY_BYTES} of tokens each, {MAX_KEYS} at most"
            )
        keys, tokens = whole[: count * KEY_BYTES], whole[count * KEY_BYTES :]
        assert self.client
        root, parent, depth = Key(fields["root"]), Key(fields["parent"]), fields["depth"]
        sought = pool.seek(root, parent, depth, keys, tokens, self.client.uses[pool.number])
        if sought.found < count and pool.shared:
            return self._seek_shared(pool, message, keys, tokens, sought)
        return self._sought(pool, message, keys, sought, 0)

    async def _seek_shared(
        self, pool: Pool, message: Message, keys: bytes, tokens: bytes, sought: Sought
    ) -> dict[str, Any]:
        fields, step = message.fields, pool.layout.block_tokens * TOKEN_BYTES
        found, at = sought.found, sought.found * KEY_BYTES
        parent = Key(keys[at - KEY_BYTES : at]) if found else Key(fields["parent"])
        root, depth = Key(fields["root"]), fields["depth"] + found
        more, tier = await pool.seek_shared(root, parent, depth, keys[at:], tokens[found * step :])
        return self._sought(pool, message, keys, sought, more, tier)

    def _sought(
        self, pool: Pool, message: Message, keys: bytes, sought: Sought, shared: int, tier: str = ""
    ) -> dict[str, Any]:
        found = sought.found + shared
        pool.count_lookup(sought, keys, shared, tier)
        self.service.noted(pool, Key(message.fields["root"]), keys, found, message.fields["depth"])
        return {"found": found}

    async def wait(self, message: Message) -> dict[str, Any]:
        """Answer once more leading keys are held than are known, or the time is up."""
        pool, keys = self._pool(message), self._keys(message)
        end = self.service.clock() + message.fields["deadline_s"]
        while True:
            found, left = pool.leading(keys), end - self.service.clock()
            if found > message.fields["known"] or left <= 0 or found * KEY_BYTES == len(keys):
                return {"found": found}
            await self.service.arrival(pool, keys[found * KEY_BYTES : (found + 1) * KEY_BYTES], left)

    def lend(self, message: Message) -> dict[str, Any] | Coroutine[Any, Any, dict[str, Any]]:
        """Lend places to read from."""
        pool = self._pool(message)
        lent = self._borrow(pool, self._keys(message))
        if lent.lacking:
            return self._lifted(pool, lent, message.fields["deadline_s"], self._lent)
        return self._lent(pool, lent)

    def _limit(self, pool: Pool) -> int:
        """Blocks of a pool that one client may have on lease."""
        return int(self.service.config.server.lease_share * pool.slab.num_places)

    def _borrow(self, pool: Pool, keys: bytes) -> Lent:
        assert self.client
        limit = self._limit(pool)
        if self.client.leased_blocks(pool) + len(keys) // KEY_BYTES > limit:
            raise RefusedError(
                f"{len(keys) // KEY_BYTES} more blocks: one client may have {limit} on lease (server.lease_share); give some back"
            )
        return pool.lend(keys)

    async def _lifted(
        self, pool: Pool, lent: Lent, deadline_s: float, answer: Callable[[Pool, Lent], dict[str, Any]]
    ) -> dict[str, Any]:
        number, self._next = self._next, self._next + 1
        self._own[number] = Held(pool, lent, self.service.clock())  # so that it goes with the connection
        try:
            await pool.lift(lent, deadline_s)
        except Exception:
            pool.give_back(lent)
            raise
        finally:
            self._own.pop(number, None)
        return answer(pool, lent)

    def _lent(self, pool: Pool, lent: Lent) -> dict[str, Any]:
        self._count_read(pool, lent.num_blocks)
        payload = [memoryview(lent.table.tobytes())]
        if not lent.num_blocks:
            pool.give_back(lent)
            return {"lease": 0, "payload": payload}
        lent.table = lent.table[lent.table["state"] == State.HERE]  # no row more than it keeps
        return {"lease": self._hold(pool, lent), "payload": payload}

    def _count_read(self, pool: Pool, num_blocks: int) -> None:
        assert self.client
        self.client.read_blocks += num_blocks
        self.service.metrics.bytes_read.add(num_blocks * pool.layout.block_bytes, "host")

    def read(self, message: Message) -> dict[str, Any] | Coroutine[Any, Any, dict[str, Any]]:
        """Send blocks: a table as that of LEND in the header, then those that are here."""
        pool = self._pool(message)
        keys = self._keys(message)
        most = min(MAX_PAYLOAD_BYTES // pool.layout.block_bytes, MAX_HEADER_BYTES // 2 // LOANS.itemsize)
        if len(keys) // KEY_BYTES > most:
            raise RefusedError(f"{len(keys) // KEY_BYTES} blocks at once: a reply has {most} at most; ask for fewer")
        lent = self._borrow(pool, keys)
        if lent.lacking:
            return self._lifted(pool, lent, message.fields["deadline_s"], self._sent)
        return self._sent(pool, lent)

    def _sent(self, pool: Pool, lent: Lent) -> dict[str, Any]:
        here = lent.table["place"][lent.table["state"] == State.HERE].tolist()
        number, self._next = self._next, self._next + 1
        table = lent.table.tobytes()
        lent.table = lent.table[lent.table["state"] == State.HERE]
        self._own[number] = Held(pool, lent, self.service.clock())
        self._count_read(pool, len(here))

        def after() -> None:
            if self._own.pop(number, None):
                pool.give_back(lent)

        return {
            "table": table,
            "payload": [pool.slab.view(place) for place in here],
            "after": after,
        }

    def release(self, message: Message) -> None:
        """What was lent is not read any more."""
        held = self.held.get(message.fields["lease"])
        if held and isinstance(held.what, Lent):
            del self.held[message.fields["lease"]]
            held.pool.give_back(held.what)

    def reserve(self, message: Message) -> dict[str, Any]:
        """Give out places for a run. Payload: its tokens."""
        pool, fields = self._pool(message), message.fields
        tokens, step = bytes(message.payload or b""), pool.layout.block_tokens * TOKEN_BYTES
        if not tokens or len(tokens) % step or len(tokens) // step > MAX_KEYS:
            raise ProtocolError(f"RESERVE with {len(tokens)} bytes of tokens: whole blocks of {step} are expected")
        if self.service.draining:
            raise RefusedError("this daemon is about to stop: it takes no more blocks")
        assert self.client
        writing = pool.reserve(
            Key(fields["root"]), Key(fields["parent"]), fields["depth"], tokens, self.client.uses[pool.number]
        )
        reply: dict[str, Any] = {"payload": [memoryview(writing.table.tobytes())], "lease": 0}
        if writing.places:
            reply["lease"] = self._hold(pool, writing)
        else:
            pool.abandon(writing)
        return reply

    def commit(self, message: Message) -> dict[str, Any]:
        """The reserved places are filled. checksums: u64 each, of the block under its key."""
        held = self.held.get(message.fields["lease"])
        if held is None or not isinstance(held.what, Writing):
            raise RefusedError("there is no such reservation any more: reserve again")
        checksums = message.fields["checksums"]
        if len(checksums) != 8 * len(held.what.places):
            raise ProtocolError(f"{len(checksums)} bytes of checksums for {len(held.what.places)} places: 8 each")
        del self.held[message.fields["lease"]]
        assert self.client
        self.client.written_blocks += len(held.what.places)
        self.service.committed(held.pool, held.what, np.frombuffer(checksums, "<u8"))
        return {}

    def abort(self, message: Message) -> dict[str, Any]:
        """The reserved places will not be filled; nobody is at them."""
        held = self.held.get(message.fields["lease"])
        if held and isinstance(held.what, Writing):
            del self.held[message.fields["lease"]]
            held.pool.abandon(held.what)
        return {}

    def report(self, message: Message) -> dict[str, Any]:
        """The client found blocks that are not what they should be."""
        pool = self._pool(message)
        most = max(1, REPORT_BYTES // pool.layout.block_bytes)
        return {"bad": pool.report(self._keys(message)[: most * KEY_BYTES])}

    def delete(self, message: Message) -> Coroutine[Any, Any, dict[str, Any]]:
        """Forget blocks in every tier."""
        return self._pool(message).delete(self._keys(message))

    def pin(self, message: Message) -> Coroutine[Any, Any, dict[str, Any]]:
        """Keep blocks in the slab for a time."""
        ttl_s, prefix = message.fields["ttl_s"], message.fields["prefix"]
        if prefix:
            return self.service.pin(*self.service.path_of(prefix), ttl_s)
        return self.service.pin(self._pool(message), self._keys(message), ttl_s)

    def unpin(self, message: Message) -> dict[str, Any]:
        """End the pin of this name; all of them if it is empty."""
        return {"ended": self.service.unpin(message.fields["pin"])}

    def forget(self, message: Message) -> Coroutine[Any, Any, dict[str, Any]]:
        """Forget what is old, or of a model, or of a tenant, in every tier."""
        return self.service.forget(message.fields)

    def flush(self, message: Message) -> Coroutine[Any, Any, dict[str, Any]]:
        """Write down what only memory holds."""
        return self.service.flush(message.fields["deadline_s"])

    def drain(self, message: Message) -> Coroutine[Any, Any, dict[str, Any]]:
        """Take no more blocks, and write down what there is."""
        self.service.draining = True
        return self.service.flush(message.fields["deadline_s"])

    def verify(self, message: Message) -> Coroutine[Any, Any, dict[str, Any]]:
        """Compare every block with its checksum; progress comes as events of this request."""
        return self.service.verify(
            lambda done: self.stream.send(Op.EVENT, message.id, done), lambda: self.stream.closed
        )

    def stats(self, message: Message) -> dict[str, Any]:
        """What the dashboard shows."""
        return {"payload": [memoryview(json.dumps(self.service.stats()).encode())]}

    def subscribe(self, message: Message) -> dict[str, Any]:
        """From now on, blocks that tiers begin and cease to hold come as events of this request; what it knew before is void."""
        self.service.subscribers[self] = message.id
        for number, log in self.service.logs.items():
            told = {"pool": number, "events": encode([log.cleared()])}
            self.stream.loop.call_soon(self.stream.send, Op.EVENT, message.id, told)  # after the answer
        return {}

    handlers: ClassVar = {
        Op.HELLO: hello,
        Op.ATTACH: attach,
        Op.PING: ping,
        Op.CONTAINS: contains,
        Op.SEEK: seek,
        Op.AWAIT: wait,
        Op.READ: read,
        Op.LEND: lend,
        Op.RELEASE: release,
        Op.RESERVE: reserve,
        Op.FILL: commit,
        Op.COMMIT: commit,
        Op.ABORT: abort,
        Op.REPORT: report,
        Op.PIN: pin,
        Op.UNPIN: unpin,
        Op.FORGET: forget,
        Op.FLUSH: flush,
        Op.DRAIN: drain,
        Op.VERIFY: verify,
        Op.STATS: stats,
        Op.SUBSCRIBE: subscribe,
        Op.DELETE: delete,
    }

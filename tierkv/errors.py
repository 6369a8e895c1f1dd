"""Every exception tierkv raises. A miss is a value, not an exception; what is here is a mistake or a broken promise.

Messages say what was given, what was expected and what to do. Nothing else of tierkv may be imported here.
"""


class TierKVError(Exception):
    """Root of all errors of tierkv: the command line prints it as one line and exits non-zero."""


class ConfigError(TierKVError):
    """A configuration that cannot work: wrong key, type, size or combination. Raised at start, never later."""


class TokensError(TierKVError):
    """Tokens of a form or range that has no KV: not integers, not one-dimensional, outside int32."""


class LayoutError(TierKVError):
    """Blocks of another shape, dtype or size than the store holds."""


class TierError(TierKVError):
    """A tier cannot be opened or used at all. A single failed transfer is not an error: it is a miss."""


class TierBusy(TierError):
    """Another process owns what this tier needs: a folder, a port."""


class ProtocolError(TierKVError):
    """A message to or from a daemon that is not what the protocol allows; the connection ends with it."""


class RefusedError(TierKVError):
    """A daemon that answers, and says no: what was asked for may not be had there, or not by this client.

    kind: "config" and "token" are for a person to mend; "refused" is this one request.
    """

    def __init__(self, message: str, *, kind: str = "refused") -> None:
        super().__init__(message)
        self.kind = kind


class CodecError(TierKVError):
    """Bytes at rest that are not what their header says. Tiers turn it into a miss counted under `reason`.

    reason: a value of tiers.base.Miss: "corrupt", or "layout" for a sound object that another configuration wrote.
    """

    def __init__(self, message: str, *, reason: str = "corrupt") -> None:
        super().__init__(message)
        self.reason = reason


class RequestError(TierKVError):
    """A request the engine cannot serve: empty prompt, prompt past the context, impossible sampling."""


class PinError(TierKVError):
    """Blocks that cannot be kept on request: more than pins may keep, or for no time that makes sense."""


class ModelError(TierKVError):
    """A model that cannot be loaded or cannot run on paged attention."""


class TraceError(TierKVError):
    """A request trace that cannot be read: `file:line`, what is there, what was expected."""


class InputError(TierKVError):
    """An input of `tierkv warm` or `tierkv pack build` that cannot be used: where, what is there, what was expected."""


class PackError(TierKVError):
    """A pack that cannot be read, written, shipped or trusted: which one, what is wrong with it, what to do."""


class PackAway(PackError):
    """A pack whose server does not answer: it may some other time, and nobody waits for it."""

"""What the daemon shows over HTTP: the dashboard page, its figures as JSON and Prometheus text, whether it is well.

It only reads: there is nothing here that changes a block, and nothing here knows a password. Figures come from callables.
"""

import base64
import errno
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from ipaddress import ip_address
from typing import Any, Final

from aiohttp import web

from tierkv.errors import ConfigError, TierBusy

JSON: Final = "application/json; charset=utf-8"
TEXT: Final = "text/plain; charset=utf-8"
PROMETHEUS: Final = "text/plain; version=0.0.4; charset=utf-8"
HTML: Final = "text/html; charset=utf-8"
PATHS: Final = ("/", "/stats", "/metrics", "/healthz", "/readyz")
METHODS: Final = ("GET", "HEAD")
CLOSE_TIMEOUT_S: Final = 2.0
MAX_SHOWN: Final = 120
"""Characters of what a stranger sent that an answer repeats."""


class HttpServer:
    """Serves the page and its figures, on one address.

    stats: the document of the page.  metrics: text in the exposition format 0.0.4.  ready: None, or why requests would fail now.
    All three are called on the event loop, so they must be quick; what they raise is a 500 without detail, and a log line.
    """

    def __init__(
        self,
        *,
        stats: Callable[[], dict[str, Any]],  # Any: values of a JSON document
        metrics: Callable[[], str],
        ready: Callable[[], str | None],
    ) -> None:
        self._stats, self._metrics, self._ready = stats, metrics, ready
        self._page = (files("tierkv") / "data" / "dashboard.html").read_text(encoding="utf-8")
        self._headers = _headers(self._page)
        self._host: str | None = None
        self._runner: web.ServerRunner | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port: the one the system chose, where port is 0.

        Raises TierBusy when somebody else listens there, ConfigError when this machine has no such address.
        """
        runner = web.ServerRunner(web.Server(self._answer, access_log=None), shutdown_timeout=CLOSE_TIMEOUT_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            await runner.cleanup()
            where = f"http {host}:{port}: {error.strerror or error}"
            if error.errno == errno.EADDRINUSE:
                raise TierBusy(f"{where}; stop what listens there, or give another port") from None
            raise ConfigError(f"{where}; give an address of this machine, such as 127.0.0.1:9419") from None
        self._host, self._runner = host.lower(), runner
        return int(runner.addresses[0][1])

    async def close(self) -> None:
        """Stop listening and let answers that are being sent end, for a moment."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        refusal = _refusal(request.headers.getall("Host", []), self._host)
        if refusal is not None:
            return self._text(refusal, status=421)
        if request.path not in PATHS:
            return self._text(f"there is no {_shown(request.path)} here; there is {', '.join(PATHS)}", status=404)
        if request.method not in METHODS:
            said = f"{_shown(request.method)} is not possible here: {' and '.join(METHODS)} are"
            return self._text(said, status=405, headers={"Allow": ", ".join(METHODS)})
        return self._found(request.path)

    def _found(self, path: str) -> web.Response:
        match path:
            case "/stats":
                return self._text(json.dumps(self._stats(), ensure_ascii=False, allow_nan=False), kind=JSON)
            case "/metrics":
                return self._text(self._metrics(), kind=PROMETHEUS)
            case "/healthz":
                return self._text("ok")
            case "/readyz":
                why_not = self._ready()
                return self._text("ok") if why_not is None else self._text(why_not, status=503)
        return self._text(self._page, kind=HTML)

    def _text(
        self, body: str, *, kind: str = TEXT, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> web.Response:
        if kind == TEXT:
            body += "\n"
        fields = {**self._headers, **(headers or {}), "Content-Type": kind}
        return web.Response(body=body.encode("utf-8", "replace"), status=status, headers=fields)


def _headers(page: str) -> dict[str, str]:
    """What every answer carries. Only this page's own style and script run, and they may ask only this server.

    Trusted types make a browser refuse any assignment of text as markup, so that a client's name can never become any.
    """
    style, script = (_hashes(page, tag) for tag in ("style", "script"))
    policy = (
        f"default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store",
        "Server": "tierkv",
    }


def _hashes(page: str, tag: str) -> str:
    inline = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    assert inline, f"the page has a <{tag}> without attributes"
    digests = (hashlib.sha256(text.encode()).digest() for text in inline)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _refusal(given: list[str], configured: str | None) -> str | None:
    """Why a Host header is not ours, or None.

    A page of a stranger can point its own name at this address and then read what is here (DNS rebinding). It cannot do that
    under a name it does not own: an IP address, localhost, and the name that the daemon was told to listen on.
    """
    if len(given) != 1:
        return "give one Host header"
    name = _host_name(given[0])
    if name == "localhost" or name.endswith(".localhost") or name == configured or _is_address(name):
        return None
    return (
        f"{_shown(name)} is not a name of this server: use its IP address, or configure this name as its HTTP address"
    )


def _host_name(host: str) -> str:
    """Without the port, lower case; brackets of IPv6 stay, because without them there is no telling what is the port."""
    bracket = host.rfind("]")
    colon = host.rfind(":")
    name = host[:colon] if colon > bracket else host
    return name.strip().lower().removesuffix(".")


def _is_address(name: str) -> bool:
    bare = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    try:
        ip_address(bare)
    except ValueError:
        return False
    return True


def _shown(given: str) -> str:
    """What a stranger sent, in one printable line."""
    kept = "".join(letter if letter.isprintable() else "?" for letter in given[:MAX_SHOWN])
    return f"{kept}…" if len(given) > MAX_SHOWN else kept

"""Chromium without a window, driven over its DevTools protocol: as much of it as tests of a page need."""

import asyncio
import base64
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import aiohttp

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ABSENT = "there is no chromium here: apt-get install chromium"
TIMEOUT_S = 60.0
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-sync",
    "--no-pings", "--no-proxy-server", "--hide-scrollbars", "--remote-debugging-port=0",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)  # fmt: skip


@contextmanager
def chromium(profile: Path) -> Iterator[str]:
    """A browser for as long as the block runs; gives its DevTools address."""
    assert PROGRAM is not None
    command = [PROGRAM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("DevTools listening on "):
                break
        else:
            raise AssertionError(f"chromium did not start: {''.join(said)[-2000:]}")
        # It goes on talking; a full pipe would stop it.
        drain = Thread(target=process.stderr.read)
        drain.start()
        try:
            yield line.split()[-1]
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)
            drain.join()


class Page:
    """One tab. console: what scripts and the browser complained about."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: str | None = None
        self.console: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = len(self._answers) + 1
        self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(message | ({"sessionId": self._session} if self._session else {}))
        async with asyncio.timeout(TIMEOUT_S):
            answer = await self._answers[number]
        assert "error" not in answer, (method, answer)
        return answer["result"]

    async def listen(self) -> None:
        async for message in self._socket:
            given = json.loads(message.data)
            if "id" in given:
                self._answers[given["id"]].set_result(given)
            elif given["method"] == "Runtime.exceptionThrown":
                self.console.append(json.dumps(given["params"]["exceptionDetails"]))
            elif given["method"] == "Log.entryAdded" and given["params"]["entry"]["level"] in ("error", "warning"):
                self.console.append(given["params"]["entry"]["text"])
            elif given["method"] == "Runtime.consoleAPICalled" and given["params"]["type"] in (
                "error",
                "warning",
                "assert",
            ):
                self.console.append(json.dumps(given["params"]["args"]))

    async def attach(self) -> str:
        target = (await self.call("Target.createTarget", url="about:blank"))["targetId"]
        self._session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        return str(target)

    async def look(self, width: int, height: int = 900, *, scheme: str = "light") -> None:
        """Take the size of a screen, and a person's wish for dark or light."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        wish = {"name": "prefers-color-scheme", "value": scheme}
        await self.call("Emulation.setEmulatedMedia", features=[wish])

    async def run(self, script: str) -> Any:
        """The value of an expression on the page; waits for a promise."""
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait for a condition in the page's own language, looked at once a frame."""
        await self.run(
            f"new Promise((done) => {{ const look = () => ({condition}) ? done(true) : setTimeout(look, 20); look(); }})"
        )

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)

    async def picture(self, path: Path) -> None:
        """The whole page, as a PNG."""
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def page(devtools: str) -> AsyncIterator[Page]:
    """A fresh tab of a running browser."""
    async with aiohttp.ClientSession() as session, session.ws_connect(devtools, max_msg_size=0) as socket:
        tab = Page(socket)
        listener = asyncio.create_task(tab.listen())
        try:
            target = await tab.attach()
            yield tab
            tab._session = None
            await tab.call("Target.closeTarget", targetId=target)
        finally:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)

"""The daemon's page in a real browser, against a real server: what it shows is what the daemon says, and nothing it says runs."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import browser
from tests.browser import Page, chromium, page
from tests.daemon_stats import document, empty_document, figures, later, serving

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason=browser.ABSENT)

SHOWN = "!!document.querySelector('article')"
ASK_AGAIN = "poll().then(() => true)"
INJECTIONS = (
    "<img src=x onerror=\"window.broken='img'\">",
    "<script>window.broken='script'</script>",
    "javascript:window.broken='url'",
    "\"><svg onload=window.broken='svg'>",
    "\u202ereversed\u0000",
)


@pytest.fixture(scope="module")
def devtools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chromium(tmp_path_factory.mktemp("browser")) as address:
        yield address


@asynccontextmanager
async def opened(devtools: str, port: int, *, width: int = 1280, scheme: str = "light") -> AsyncIterator[Page]:
    async with page(devtools) as tab:
        await tab.look(width, scheme=scheme)
        await tab.open(f"http://127.0.0.1:{port}/")
        await tab.until(SHOWN)
        yield tab


def on_page(
    devtools: str, visit: Callable[[Page], Awaitable[None]], stats: Callable[[], dict[str, Any]], **look: Any
) -> None:
    """Visit the page of these figures; whatever the browser complains about fails the test."""

    async def run(port: int) -> None:
        async with opened(devtools, port, **look) as tab:
            await visit(tab)
            assert tab.console == []

    with serving(stats) as port:
        asyncio.run(run(port))


async def shown_figures(tab: Page) -> dict[str, str]:
    """Values of all figures, which must have different names."""
    script = (
        "JSON.stringify([...document.querySelectorAll('[data-figure]')].map((one) => [one.dataset.figure, one.value]))"
    )
    pairs = json.loads(await tab.run(script))
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


async def figure(tab: Page, name: str) -> str:
    return str(await tab.run(f"document.querySelector('[data-figure=\"{name}\"]').textContent"))


def test_every_figure_equals_the_document(devtools: str) -> None:
    async def visit(tab: Page) -> None:
        shown = await shown_figures(tab)
        for name, value in figures(document()).items():
            assert (float(shown[name]) if shown[name] else None) == value, name
        assert float(shown["hit_rate"]) == 6_110_655 / 8_120_440

    on_page(devtools, visit, document)


def test_figures_are_written_for_people(devtools: str) -> None:
    async def visit(tab: Page) -> None:
        assert await figure(tab, "lookups.hit_blocks") == "6,110,655"
        assert await figure(tab, "hit_rate") == "75.3 %"
        assert await figure(tab, "tier.host.capacity_bytes") == "64.00 GiB"
        assert await figure(tab, "tier.host.load_s.p50") == "410 µs"
        assert await figure(tab, "tier.redis.save_s.p99") == "1.72 s"
        assert await figure(tab, "request.read.p99_s") == "18.4 ms"
        assert await figure(tab, "request.pin.p50_s") == "–"
        assert await figure(tab, "uptime_s") == "2 d 4 h"
        assert await tab.run("document.querySelector('#prefixes time').textContent") == "2 s ago"
        assert await tab.run("document.querySelector('#pins time').textContent") == "in 6 min 52 s"

    on_page(devtools, visit, document)


def test_blocks_a_second_come_from_two_documents(devtools: str) -> None:
    first = document()
    second = later(first, seconds=4.0, blocks=30, evicted_blocks=10)
    third = later(second, seconds=2.0, blocks=-50)  # gone without an eviction: a purge
    told = [first, second, third]

    async def visit(tab: Page) -> None:
        assert await figure(tab, "tier.host.in") == "–"
        await tab.run(ASK_AGAIN)
        assert (await figure(tab, "tier.host.in"), await figure(tab, "tier.host.out")) == ("10", "2.5")
        assert await figure(tab, "tier.disk.in") == "0.0"
        await tab.run(ASK_AGAIN)
        assert (await figure(tab, "tier.host.in"), await figure(tab, "tier.host.out")) == ("0.0", "25")

    on_page(devtools, visit, lambda: told.pop(0) if len(told) > 1 else told[0])


def test_history_of_a_daemon_that_started_again_is_dropped(devtools: str) -> None:
    told = [document(), later(document(), seconds=2.0, blocks=8), empty_document() | {"started": 1764700000.0}]

    async def visit(tab: Page) -> None:
        await tab.run(ASK_AGAIN)
        assert await tab.run("memory.points.length") == 2
        await tab.run(ASK_AGAIN)
        assert await tab.run("memory.points.length") == 1
        assert await figure(tab, "tier.host.in") == "–"

    on_page(devtools, visit, lambda: told.pop(0) if len(told) > 1 else told[0])


def test_text_of_strangers_is_shown_and_never_runs(devtools: str) -> None:
    stats = document()
    for row, text in zip(stats["clients"], INJECTIONS, strict=False):
        row["name"] = row["address"] = text
    for row, text in zip(stats["prefixes"], reversed(INJECTIONS), strict=False):
        row["model"] = row["tenant"] = text
    stats["namespaces"][0] |= {
        "model": INJECTIONS[0],
        "adapter": INJECTIONS[1],
        "tenant": INJECTIONS[3],
        "dtype": INJECTIONS[0],
    }
    stats |= {
        "name": INJECTIONS[0],
        "misses": {INJECTIONS[0]: 1},
        "saves_dropped": {INJECTIONS[3]: 1},
        "state": INJECTIONS[1],
    }
    stats["tiers"][0]["place"] = INJECTIONS[3]

    async def visit(tab: Page) -> None:
        await tab.run(ASK_AGAIN)
        assert await tab.run("window.broken === undefined")
        assert (
            await tab.run("document.querySelectorAll('main img, main script, bdi *, [onload], [onerror]').length") == 0
        )
        assert await tab.run("document.querySelector('#clients tbody bdi').textContent") == INJECTIONS[0]
        assert await tab.run("document.querySelector('#name').textContent") == INJECTIONS[0]

    on_page(devtools, visit, lambda: stats)


def test_browser_refuses_markup_and_scripts_that_are_not_the_page_s(devtools: str) -> None:
    attempts = (
        "document.body.innerHTML = '<b>x</b>'",
        "document.body.insertAdjacentHTML('beforeend', '<b>x</b>')",
        "document.createElement('script').text = 'window.broken = 1'",
    )

    async def run(port: int) -> None:
        async with opened(devtools, port) as tab:
            for attempt in attempts:
                assert (
                    await tab.run(f"(() => {{ try {{ {attempt}; return 'done' }} catch (e) {{ return e.name }} }})()")
                    == "TypeError"
                )
            blocked = await tab.run(
                "new Promise((done) => {"
                " document.addEventListener('securitypolicyviolation', (one) => done(one.effectiveDirective));"
                " document.body.append(Object.assign(document.createElement('img'), { src: 'http://127.0.0.1:9/x' })); })"
            )
            assert blocked == "img-src"
            assert await tab.run("window.broken === undefined")

    with serving() as port:
        asyncio.run(run(port))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 400, 340])
@pytest.mark.parametrize("stats", [document, empty_document], ids=["busy", "empty"])
def test_nothing_is_wider_than_the_screen(
    devtools: str, width: int, scheme: str, stats: Callable[[], dict[str, Any]]
) -> None:
    # What scrolls inside its own card may be wider than the card: tables, on the narrowest screens.
    outside = """[...document.querySelectorAll('body :not(.unseen, .unseen *, svg *)')].filter((one) => {
        const { width, left, right } = (one.closest('section') || one).getBoundingClientRect();
        return width && (right > innerWidth + 0.5 || left < -0.5) && getComputedStyle(one).clipPath === 'none';
    }).map((one) => one.outerHTML.slice(0, 120))"""
    scrolling = """[...document.querySelectorAll('section')].filter((one) => one.scrollWidth > one.clientWidth)
        .map((one) => one.id)"""

    async def visit(tab: Page) -> None:
        assert await tab.run("innerWidth") == width
        assert await tab.run("document.documentElement.scrollWidth <= innerWidth")
        assert await tab.run(outside) == []
        if width >= 400:
            assert await tab.run(scrolling) == []

    on_page(devtools, visit, stats, width=width, scheme=scheme)


def test_long_words_of_strangers_do_not_widen_a_narrow_page(devtools: str) -> None:
    stats = document()
    for row in (*stats["clients"], *stats["prefixes"], *stats["namespaces"]):
        row |= {name: "w" * 300 for name in ("name", "address", "model", "tenant", "adapter") if name in row}
    stats |= {"name": "h" * 300, "listen": ["unix:///" + "p" * 100]}
    stats["tiers"][1]["place"] = "/" + "d" * 300

    async def visit(tab: Page) -> None:
        assert await tab.run("document.documentElement.scrollWidth <= innerWidth")

    on_page(devtools, visit, lambda: stats, width=400)


def test_silent_daemon_is_told_with_the_age_of_the_figures_and_its_return_is_seen(devtools: str) -> None:
    async def before(port: int) -> None:
        async with opened(devtools, port) as tab:
            gone.set()
            await closed.wait()
            await tab.run(ASK_AGAIN)
            assert await tab.run("document.body.dataset.state") == "stale"
            assert (await tab.run("document.querySelector('[role=alert]').textContent")).startswith(
                "The daemon does not answer"
            )
            assert await tab.run("document.querySelector('#state').textContent") == "✕ no answer"
            assert await tab.run("document.title") == "no answer: gpu-node-07 · tierkv"
            await tab.run("asking.at -= 75000, announce()")
            assert (await tab.run("document.querySelector('#age').textContent")).startswith("figures 1 min 1")
            assert await figure(tab, "lookups.hit_blocks") == "6,110,655"
            back.set()
            await opened_again.wait()
            await tab.run(ASK_AGAIN)
            assert await tab.run("document.body.dataset.state") == "live"
            assert await tab.run("document.querySelector('[role=alert]').textContent") == ""

    async def run() -> None:
        from tierkv.daemon.http import HttpServer

        server = HttpServer(stats=document, metrics=str, ready=lambda: None)
        port = await server.start("127.0.0.1", 0)
        visit = asyncio.create_task(before(port))
        try:
            await first_of(gone, visit)
            await server.close()
            closed.set()
            await first_of(back, visit)
            await server.start("127.0.0.1", port)
            opened_again.set()
            await visit
        finally:
            await server.close()

    gone, closed, back, opened_again = (asyncio.Event() for _ in range(4))
    asyncio.run(run())


async def first_of(event: asyncio.Event, task: "asyncio.Task[None]") -> None:
    """Wait for the event; a task that fails before it fails the test instead of hanging it."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        task.result()


def test_error_of_the_daemon_is_told_and_the_page_goes_on_asking(devtools: str) -> None:
    broken: list[bool] = []

    def stats() -> dict[str, Any]:
        if broken:
            raise RuntimeError("planted")
        return document()

    async def run(port: int) -> None:
        async with opened(devtools, port) as tab:
            broken.append(True)
            await tab.run(ASK_AGAIN)
            assert "it says 500" in await tab.run("document.querySelector('[role=alert]').textContent")
            broken.clear()
            await tab.until("document.body.dataset.state === 'live'")  # by its own clock

    with serving(stats) as port:
        asyncio.run(run(port))


def test_document_of_another_shape_is_told_and_does_not_end_the_page(devtools: str) -> None:
    told = [document(), {"tiers": []}, document()]

    async def visit(tab: Page) -> None:
        await tab.run(ASK_AGAIN)
        assert await tab.run("document.body.dataset.state") == "stale"
        await tab.run(ASK_AGAIN)
        assert await tab.run("document.body.dataset.state") == "live"

    on_page(devtools, visit, lambda: told.pop(0) if len(told) > 1 else told[0])


def test_hidden_page_does_not_ask_and_a_seen_one_asks_at_once(devtools: str) -> None:
    asked: list[int] = []

    def stats() -> dict[str, Any]:
        asked.append(1)
        return document()

    async def visit(tab: Page) -> None:
        hide = (
            "Object.defineProperty(document, 'hidden', { value: %s, configurable: true }),"
            " document.dispatchEvent(new Event('visibilitychange'))"
        )
        await tab.until("!asking.busy")
        await tab.run(hide % "true")
        before = len(asked)
        assert await tab.run("document.body.dataset.state") == "paused"
        assert "paused" in await tab.run("document.querySelector('#age').textContent")
        await tab.run(ASK_AGAIN)  # what a late timer would do
        assert len(asked) == before
        await tab.run(hide % "false")
        await tab.until("document.body.dataset.state === 'live' && !asking.busy")
        assert len(asked) == before + 1

    on_page(devtools, visit, stats)


def test_draining_daemon_says_so(devtools: str) -> None:
    async def visit(tab: Page) -> None:
        assert await tab.run("document.querySelector('#state').textContent") == "▲ draining"
        assert "The daemon is draining" in await tab.run("document.querySelector('[role=alert]').textContent")

    on_page(devtools, visit, lambda: document() | {"state": "draining"})


def test_empty_states_say_what_to_do(devtools: str) -> None:
    async def visit(tab: Page) -> None:
        assert (
            await tab.run("document.querySelector('#clients pre').textContent")
            == '[daemon]\nurl = "unix:///run/tierkv/tierkv.sock"'
        )
        for name in ("found", "misses", "requests", "what-if", "prefixes", "namespaces", "pins"):
            assert await tab.run(f"!!document.querySelector('#{name} .empty').textContent"), name
        assert await figure(tab, "hit_rate") == "–"

    on_page(devtools, visit, empty_document)


def test_what_a_client_is_told_to_write_is_a_configuration_that_loads(devtools: str, tmp_path: Path) -> None:
    from tierkv.config import load

    async def visit(tab: Page) -> None:
        (tmp_path / "tierkv.toml").write_text(await tab.run("document.querySelector('#clients pre').textContent"))

    on_page(devtools, visit, empty_document)
    assert load(tmp_path / "tierkv.toml").config.daemon.url == "unix:///run/tierkv/tierkv.sock"


def test_columns_sort_by_keyboard_and_keep_the_focus(devtools: str) -> None:
    async def visit(tab: Page) -> None:
        first = "document.querySelector('#prefixes tbody th').textContent"
        button = "document.querySelector('[data-sort=\"prefixes|uses\"]')"
        await tab.run(f"{button}.focus()")
        for direction, key in (("descending", "9f31c2a47be05d18"), ("ascending", "e7780b61fd2299ac")):
            for kind in ("keyDown", "keyUp"):
                await tab.call(
                    "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
                )
            assert await tab.run(f"{button}.closest('th').getAttribute('aria-sort')") == direction
            assert await tab.run(first) == key
            assert await tab.run(f"document.activeElement === {button}")
        await tab.run(ASK_AGAIN)
        assert await tab.run(first) == "e7780b61fd2299ac"
        assert await tab.run(f"document.activeElement === {button}")

    on_page(devtools, visit, document)


def test_update_keeps_what_is_selected(devtools: str) -> None:
    async def visit(tab: Page) -> None:
        await tab.run("getSelection().selectAllChildren(document.querySelector('#prefixes tbody code'))")
        await tab.run(ASK_AGAIN)
        assert await tab.run("getSelection().toString()") == "9f31c2a47be05d18"

    on_page(devtools, visit, document)


def test_theme_follows_the_system_until_somebody_chooses(devtools: str) -> None:
    async def visit(tab: Page) -> None:
        theme, press = "document.documentElement.dataset.theme", "document.querySelector('#theme').click()"
        assert await tab.run(theme) == "dark"
        await tab.look(1280, scheme="light")
        await tab.until(f"{theme} === 'light'")
        await tab.run(f"{press}, {press}")
        assert (await tab.run(theme), await tab.run("localStorage.getItem('tierkv-theme')")) == ("dark", "dark")
        await tab.run(press)
        assert await tab.run(theme) == "light"

    on_page(devtools, visit, document, scheme="dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_enough_to_read(devtools: str, scheme: str) -> None:
    """WCAG 2.1 asks for 4.5; backgrounds of the page are opaque, so the nearest one that is set counts."""
    low = """(() => {
        const parse = (text) => text.match(/[\\d.]+/g).map(Number);
        const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        const light = (colour) => {
            const [r, g, b] = colour.map((part) => linear(part / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ground = (one) => {
            for (; one; one = one.parentElement) {
                const colour = parse(getComputedStyle(one).backgroundColor);
                if (colour.length === 3) return colour;
            }
            return [255, 255, 255];
        };
        const bad = [];
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) {
            const one = walker.currentNode.parentElement;
            if (!walker.currentNode.data.trim() || one.closest('script, style, noscript, svg, .unseen')) continue;
            const [a, b] = [light(parse(getComputedStyle(one).color)), light(ground(one))].sort((x, y) => y - x);
            if ((a + 0.05) / (b + 0.05) < 4.5) bad.push([one.textContent.slice(0, 40), (a + 0.05) / (b + 0.05)]);
        }
        return bad;
    })()"""

    async def visit(tab: Page) -> None:
        assert await tab.run(low) == []

    on_page(devtools, visit, lambda: document() | {"state": "draining"}, scheme=scheme)


def test_screen_readers_get_named_tables_and_pictures(devtools: str) -> None:
    named = (
        "[...document.querySelectorAll('table')].every((one) => one.getAttribute('aria-label'))",
        "[...document.querySelectorAll('tbody tr')].every((row) => row.querySelector('th[scope=row]'))",
        "[...document.querySelectorAll('svg')].every((one) => one.ariaHidden || one.ariaLabel)",
        "[...document.querySelectorAll('section')].every((one) => byId(one.getAttribute('aria-labelledby')))",
    )

    async def visit(tab: Page) -> None:
        for condition in named:
            assert await tab.run(condition), condition
        assert await tab.run("document.documentElement.lang") == "en"
        tree = await tab.call("Accessibility.getFullAXTree")
        roles = [node["role"]["value"] for node in tree["nodes"] if not node["ignored"]]
        assert {"table", "row", "cell", "rowheader", "columnheader", "main", "heading", "alert", "status"} <= set(roles)

    on_page(devtools, visit, document, width=400)

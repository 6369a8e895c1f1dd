"""Time to the first token of the first request after a long prefix, by where its KV comes from."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.warm.documents import handbook
from tests.daemon_parts import RunningDaemon
from tests.object_servers import BUCKET, KEY, SECRET, SeaweedS3
from tierkv.assembly import LoadedModel, load_model, open_engine
from tierkv.building import threads as ship_threads
from tierkv.config import Config, load
from tierkv.engine import SamplingParams
from tierkv.packs.build import build, build_config
from tierkv.packs.files import RemoteOptions, open_files
from tierkv.packs.manifest import read_root
from tierkv.packs.pack import open_pack
from tierkv.packs.shipping import pull, push
from tierkv.warm.items import Text
from tierkv.warm.rendering import render

TOKENS = 3_000
QUESTION = "\n\nQuestion: who writes down the weather, and when?\nAnswer:"


def run(where: Path, *, rounds: int, threads: int) -> list[dict[str, Any]]:
    base = [f"engine.num_threads={threads}"]
    loaded = load_model("smollm2", load(environ={}, overrides=base).config)
    text = handbook(loaded.tokenizer, TOKENS)
    own = build_config(load(environ={}, overrides=base).config)
    documents = render(
        [Text("handbook.md", text, "handbook.md")], loaded.tokenizer, max_tokens=8191, vocab_size=1 << 20
    ).documents
    zipped, folder = where / "handbook.zip", where / "handbook"
    for out in (zipped, folder):
        build(load_model("smollm2", own), documents, out, config=own)

    def config(*more: str) -> Config:
        return load(environ={}, overrides=[*base, *more]).config

    prompt = text + QUESTION
    _, tokens = _first(loaded, config(), prompt)
    _first(loaded, config(f"disk.path={where / 'kv'}"), prompt)  # fills it
    (where / "seaweed").mkdir()
    (where / "d").mkdir()
    os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    server = SeaweedS3(where / "seaweed")
    daemon = RunningDaemon(
        load(
            environ={},
            overrides=[
                f"server.listen=unix://{where}/d/d.sock",
                "server.http=off",
                f"pack.paths={zipped}",
                "host.capacity=1GiB",
            ],
        ).config
    )
    try:
        remote = RemoteOptions(endpoint=server.endpoint, region="us-east-1")
        url = f"s3://{BUCKET}/handbook"
        with open_files(folder) as files, ship_threads("ship", count=8) as executor:
            push(files, url, entries_of=_entries, options=remote, executor=executor)
        s3 = config(f"pack.paths={url}", f"pack.endpoint={server.endpoint}", "pack.region=us-east-1")
        sources: dict[str, tuple[Config, Callable[[], object]]] = {
            "cold": (config(), _nothing),
            "warm store: disk": (config(f"disk.path={where / 'kv'}"), _nothing),
            "mounted pack, zip": (config(f"pack.paths={zipped}"), _nothing),
            "mounted pack, folder": (config(f"pack.paths={folder}"), _nothing),
            "mounted pack, zip, not in the page cache": (config(f"pack.paths={zipped}"), lambda: _drop([zipped])),
            "mounted pack, zip, every read against SHA-256": (_strict(config, zipped, where), _nothing),
            "pack mounted in a daemon, first client": (
                config(f"daemon.url={daemon.urls[0]}"),
                lambda: _emptied(daemon),
            ),
            "pack mounted in a daemon, next client": (config(f"daemon.url={daemon.urls[0]}"), _nothing),
            "pack mounted over S3 (SeaweedFS)": (s3, _nothing),
        }
        times: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(rounds):
            for name, (settings, before) in sources.items():
                before()
                seconds, same = _first(loaded, settings, prompt)
                assert same == tokens, f"{name}: other tokens"
                times[name].append(seconds)
        began = time.perf_counter()
        with ship_threads("ship", count=8) as executor:
            pull(url, where / "pulled.zip", entries_of=_entries, options=remote, executor=executor)
        pulled = time.perf_counter() - began
    finally:
        daemon.stop()
        server.close()
    with open_pack(zipped) as pack:
        size = pack.manifest.num_bytes
    medians = {name: statistics.median(found) for name, found in times.items()}
    rows = [
        {
            "name": f"first token, {name}",
            "value": medians[name],
            "unit": "s",
            "limit_name": "cold",
            "limit": medians["cold"],
            "ratio": medians["cold"] / medians[name],
            "rounds": rounds,
        }
        for name in sources
    ]
    rows.append(_plain(f"pull {size / 1e6:.0f} MB from S3", pulled, "s"))
    return rows


def _plain(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "limit_name": None, "limit": None, "ratio": None, "rounds": 1}


def _entries(root: bytes) -> Any:
    return read_root(root, place="handbook").files


def _nothing() -> None:
    pass


def _first(loaded: LoadedModel, config: Config, prompt: str) -> tuple[float, tuple[int, ...]]:
    """Seconds to the first token of the first request of a new engine and store, and eight tokens."""
    with open_engine(loaded, config) as (engine, _):
        output = engine.generate(prompt, SamplingParams(max_tokens=8))[0]
    return output.stats.ttft_s, output.token_ids


def _strict(config: Callable[..., Config], pack: Path, where: Path) -> Config:
    from tierkv.packs.signing import make_key, read_private, sign
    from tierkv.packs.write import sign_in_place

    public = make_key(where / "key.pem")
    with open_pack(pack) as opened:
        raw = opened.manifest.raw
    sign_in_place(pack, raw, [sign(raw, read_private(where / "key.pem"))])
    return config(f"pack.paths={pack}", f"pack.signers={public}")


def _drop(paths: Sequence[Path]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _emptied(daemon: RunningDaemon) -> None:
    """Let the daemon forget what its memory holds: a pack stays."""
    client = daemon.client()
    try:
        client.forget(older_s=0.0)
    finally:
        client.close()

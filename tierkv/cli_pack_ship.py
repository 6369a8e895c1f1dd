"""`tierkv pack push | pull | mount`: bring a pack to where it is used."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tierkv import cli_inputs
from tierkv.cli_options import AsJson, ConfigFile, Overrides, print_json, print_rows, read_config, show_bytes
from tierkv.cli_pack_options import Endpoint, Place, Signers, remote_options, trusted_signers
from tierkv.cli_progress import Meter
from tierkv.config import Config
from tierkv.errors import PackError

if TYPE_CHECKING:
    from tierkv.packs.pack import Pack
    from tierkv.packs.shipping import Shipped

SHIPPING_THREADS: Final = 8


def push(
    place: Place,
    destination: Annotated[str, typer.Argument(metavar="URL", help="s3://bucket/prefix, or s3://bucket/name.zip.")],
    endpoint: Endpoint = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Copy a pack to an S3-compatible server. What is there already does not move; interrupted, it goes on."""
    from tierkv.building import threads
    from tierkv.packs.files import open_files
    from tierkv.packs.shipping import push as push_pack

    remote = remote_options(endpoint, config, overrides)
    with (
        open_files(place, options=remote) as files,
        _shipping(files) as meter,
        threads("ship", count=SHIPPING_THREADS) as executor,
    ):
        done = push_pack(files, destination, entries_of=_entries, options=remote, progress=meter.add, executor=executor)
    _tell(done, destination, as_json=as_json)


def pull(
    source: Place,
    destination: Annotated[Path, typer.Argument(metavar="PACK", help="A folder, or a name that ends with .zip.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a pack that is there; files in common stay.")
    ] = False,
    signer: Signers = None,
    endpoint: Endpoint = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Copy a pack from S3, or from any web server that serves ranges. Only what is missing moves; interrupted, it goes on.

    It appears under its name when all of it has come and is what its manifest says.
    """
    from tierkv.building import threads
    from tierkv.packs.files import open_files
    from tierkv.packs.manifest import MAX_ROOT_BYTES, ROOT, read_root
    from tierkv.packs.shipping import pull as pull_pack
    from tierkv.packs.signing import check

    settings = read_config(config, overrides).config
    remote = remote_options(endpoint, config, overrides)
    trusted = trusted_signers(signer, settings)

    def accept(root: bytes) -> None:
        check(read_root(root, place=source), trusted=trusted, place=source)

    with open_files(source, options=remote) as files:
        accept(files.read(ROOT, most=MAX_ROOT_BYTES))
        with _shipping(files) as meter, threads("ship", count=SHIPPING_THREADS) as executor:
            done = pull_pack(
                source,
                destination,
                entries_of=_entries,
                options=remote,
                accept=accept,
                replace=replace,
                progress=meter.add,
                executor=executor,
            )
    _tell(done, str(destination), as_json=as_json)


def mount(
    place: Place,
    into: Annotated[Path, typer.Option("--into", metavar="FILE", help="Configuration file to add it to.")] = Path(
        "tierkv.toml"
    ),
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="See that it is for this model first.")
    ] = None,
    signer: Signers = None,
    endpoint: Endpoint = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Check a pack and add it to a configuration, as a tier that stores and daemons read in place.

    A running daemon takes it up at the next SIGHUP, while its clients stay.
    """
    from tierkv.building import remote_of
    from tierkv.packs.mounting import add_to_config
    from tierkv.packs.pack import open_pack
    from tierkv.values import hide_secrets

    settings = read_config(config or (into if into.exists() else None), overrides).config
    remote = remote_of(settings)
    remote = replace(remote, endpoint=endpoint or remote.endpoint)
    with open_pack(place, trusted=trusted_signers(signer, settings), remote=remote) as opened:
        if model is not None:
            _fits(opened, model, settings)
        (wrong,) = opened.read([0], [memoryview(bytearray(opened.layout.block_bytes))])
        if wrong is not None:
            raise PackError(f"{opened.place}: its first block cannot be read: {wrong.why}; see `tierkv pack verify`")
        blocks, size = opened.num_blocks, opened.manifest.num_bytes
    where = place if "://" in place else str(Path(place).expanduser().absolute())
    add_to_config(into, where, endpoint=remote.endpoint)
    print_rows(
        [
            ("mounted", f"{hide_secrets(where)}: {blocks:,} blocks, {show_bytes(size)}"),
            ("in", f'{into} ([[tiers]] kind = "pack")'),
        ]
    )


def _fits(opened: "Pack", model: str, settings: Config) -> None:
    from tierkv.building import shard_of
    from tierkv.engine.facts import facts_of
    from tierkv.engine.loading import identity, layout_of
    from tierkv.facts import differing

    loaded = cli_inputs.load(model, settings)
    layout = layout_of(loaded.weights, block_tokens=settings.store.block_tokens)
    if misfit := shard_of(settings).misfit(opened.layout, layout):
        raise PackError(f"{opened.place}: made for another layout: {misfit}; build a pack for this model")
    ours = facts_of(loaded.weights, loaded.tokenizer, identity=identity(loaded.weights))
    if differs := differing(opened.manifest.facts, ours):
        raise PackError(f"{opened.place}: built for another model: {', '.join(differs)}; build a pack for this one")


def _entries(root: bytes) -> Any:  # Any: entries by name
    from tierkv.packs.manifest import read_root

    return read_root(root, place="the pack").files


@contextmanager
def _shipping(files: Any) -> "Iterator[Meter]":  # Any: PackFiles
    from tierkv.packs.pack import read_manifest

    with Meter("shipping", read_manifest(files).num_bytes, unit="bytes") as meter:
        yield meter


def _tell(done: "Shipped", where: str, *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(done) | {"place": where})
        return
    speed = done.bytes_moved / done.seconds if done.seconds else 0.0
    print_rows(
        [
            ("pack", where),
            ("moved", f"{show_bytes(done.bytes_moved)} in {done.seconds:,.1f} s, {show_bytes(speed)}/s"),
            ("there already", show_bytes(done.bytes_there)),
        ]
    )

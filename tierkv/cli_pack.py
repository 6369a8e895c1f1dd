"""`tierkv pack`: build KV of known prompts as an artefact, look at it, vouch for it, ship it, mount it."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.table import Table

from tierkv import cli_inputs
from tierkv.cli_inputs import AsMessage, Given, Glob, MaxFileSize, Model, SystemOnly
from tierkv.cli_options import (
    AsJson,
    ConfigFile,
    Overrides,
    console,
    print_json,
    print_rows,
    read_config,
    show_bytes,
    text,
)
from tierkv.cli_pack_options import Endpoint, Place, Signers, remote_options, trusted_signers
from tierkv.cli_pack_ship import mount, pull, push
from tierkv.cli_progress import Meter, stopping
from tierkv.config import DTYPES, Config
from tierkv.errors import ConfigError, PackError

if TYPE_CHECKING:
    from tierkv.packs.files import RemoteOptions
    from tierkv.packs.manifest import Manifest
    from tierkv.packs.pack import Pack

INTERRUPTED: Final = 130
SHOWN: Final = 20

pack = typer.Typer(
    help="Build the KV of known prompts as an artefact, look at it, sign it, ship it, mount it.", no_args_is_help=True
)


@pack.command()
def build(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="PACK", help="A new folder, or a name that ends with .zip.")
    ],
    given: Given = None,
    model: Model = None,
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE", help="Sign it with this private key.")] = None,
    glob: Glob = "**/*",
    max_file_size: MaxFileSize = "16MiB",
    system_only: SystemOnly = False,
    as_message: AsMessage = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compute the KV of prompts and write it as a pack: one zarr store, a folder or a zip file.

    The same inputs, model and machine give the same bytes. Ctrl-C, or kill, at any moment: the same command goes on.

    tierkv pack build --model smollm2 --out handbook.zip handbook.md
    """
    from tierkv.packs.build import build as build_pack
    from tierkv.packs.build import build_config
    from tierkv.packs.pack import open_pack
    from tierkv.packs.signing import read_private, sign
    from tierkv.packs.write import sign_in_place

    settings = build_config(read_config(config, overrides).config)
    name = cli_inputs.model_name(model, settings)
    private = None if key is None else read_private(key)
    if out.exists():
        raise PackError(f"{out} exists already: give another name, or remove it")
    if not out.absolute().parent.is_dir():
        raise PackError(f"{out}: there is no folder {out.absolute().parent}: make it, or give another place")
    inputs = cli_inputs.read(given, glob=glob, max_file_size=max_file_size)
    loaded = cli_inputs.load(name, settings)
    documents, skipped = cli_inputs.documents_of(inputs, loaded, system_only=system_only, as_message=as_message)
    if not as_json:
        cli_inputs.tell_skipped(skipped)
    total = sum(document.num_tokens for document in documents)
    with Meter("computing", total, unit="tokens") as meter, stopping(meter):
        plan, done = build_pack(
            loaded, documents, out, config=settings, computed=meter.add, held=meter.skip, planned=meter.expect
        )
    if done.interrupted:
        sys.stderr.write(f"{out} is not finished: the same command goes on from here\n")
        raise typer.Exit(INTERRUPTED)
    if private is not None:
        with open_pack(out, strict=False) as made:
            raw = made.manifest.raw
        sign_in_place(out, raw, [sign(raw, private)])
    with open_pack(out, strict=False) as made:
        report = _about(made.manifest, made) | {
            "computed_tokens": done.computed_tokens,
            "held_tokens": done.held_tokens,
            "seconds": done.seconds,
            "skipped": cli_inputs.as_rows(skipped),
        }
    if as_json:
        print_json(report)
        return
    print_rows(
        [
            ("pack", str(out)),
            ("documents", f"{len(documents):,} ({len(skipped):,} skipped), {total:,} tokens"),
            ("computed", f"{done.computed_tokens:,} tokens in {done.seconds:,.1f} s, {done.held_tokens:,} were there"),
            ("blocks", f"{plan.num_blocks:,} of {plan.block_tokens} tokens, {show_bytes(report['bytes'])}"),
            ("signed by", ", ".join(report["signers"]) or "nobody"),
        ]
    )


@pack.command()
def inspect(
    place: Place,
    endpoint: Endpoint = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a pack says of itself: model, layout, documents, signatures. No block is read."""
    from tierkv.packs.files import open_files
    from tierkv.packs.pack import read_manifest
    from tierkv.warm.items import printable

    with open_files(place, options=remote_options(endpoint, config, overrides)) as files:
        manifest, where = read_manifest(files), files.place
    if as_json:
        print_json(_about(manifest, None) | {"place": where, "manifest": manifest.raw})
        return
    facts, layout = manifest.facts, manifest.layout
    print_rows(
        [
            ("pack", where),
            ("made by", manifest.tool),
            ("model", f"{manifest.model_name} ({facts.architecture}), identity {facts.identity}"),
            ("weights", f"SHA-256 {manifest.weights_sha256}"),
            ("tokenizer", facts.tokenizer_sha256 or "none"),
            ("chat template", facts.chat_template_sha256 or "none"),
            ("RoPE", printable(", ".join(f"{name} {value}" for name, value in facts.rope.items())) or "-"),
            ("block", f"{' x '.join(map(str, layout.shape))} {layout.dtype}, {layout.block_bytes:,} bytes"),
            ("blocks", f"{manifest.num_blocks:,} of {layout.block_tokens} tokens, {show_bytes(manifest.num_bytes)}"),
            ("signatures", ", ".join(one.public_key for one in manifest.signatures) or "none"),
        ]
    )
    table = Table("document", "tokens", "blocks", "characters", box=None, pad_edge=False, header_style="bold")
    for one in manifest.documents[:SHOWN]:
        characters = "-" if one.num_characters is None else f"{one.num_characters:,}"
        table.add_row(text(one.name), f"{one.num_tokens:,}", f"{one.num_blocks:,}", characters)
    console().print(table)
    if len(manifest.documents) > SHOWN:
        sys.stdout.write(f"and {len(manifest.documents) - SHOWN:,} more\n")


@pack.command()
def verify(
    place: Place,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="MODEL", help="Also compute a sample of blocks anew with this model."),
    ] = None,
    signer: Signers = None,
    endpoint: Endpoint = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Look at every byte of a pack: signature, checksums, keys from tokens; with --model also whether the KV is right.

    Exit code 1 when something is wrong; each finding says where.
    """
    from tierkv.packs.files import open_files
    from tierkv.packs.pack import read_manifest
    from tierkv.packs.verify import Finding
    from tierkv.packs.verify import verify as look

    settings = read_config(config, overrides).config
    remote = remote_options(endpoint, config, overrides)
    trusted = trusted_signers(signer, settings)
    with open_files(place, options=remote) as files:
        total, where = read_manifest(files).num_bytes, files.place
    with Meter("verifying", total, unit="bytes") as meter:
        found = look(place, trusted=trusted, remote=remote, progress=meter.add)
    findings = list(found.findings)
    compared: dict[str, Any] | None = None  # Any: JSON
    if model is not None and not findings:
        compared, more = _recompute(place, model, settings, trusted, remote)
        findings += [Finding(*one) for one in more]
    report = {
        "place": where,
        "sound": not findings,
        "blocks": found.num_blocks,
        "bytes": found.num_bytes,
        "signers": list(found.signers),
        "recomputed": compared,
        "findings": [asdict(one) for one in findings],
    }
    if as_json:
        print_json(report)
    else:
        rows = [
            ("pack", where),
            ("looked at", f"{found.num_blocks:,} blocks, {show_bytes(found.num_bytes)}"),
            ("signed by", ", ".join(found.signers) or "nobody"),
        ]
        if compared is not None:
            rows.append(
                (
                    "recomputed",
                    f"{compared['blocks']:,} blocks with {model}: largest error {compared['error']:.1e}, "
                    f"tolerance {compared['tolerance']:g} ({found.manifest.layout.dtype})",
                )
            )
        print_rows([*rows, ("sound", "yes" if not findings else "no")])
        for one in findings:
            sys.stdout.write(f"{one.where}: {one.what}\n")
    if findings:
        raise typer.Exit(1)


def _recompute(
    place: str, model: str, settings: Config, trusted: Sequence[str] | None, remote: "RemoteOptions"
) -> tuple[dict[str, Any] | None, list[tuple[str, str]]]:  # Any: JSON
    from tierkv.engine.facts import facts_of
    from tierkv.engine.loading import identity
    from tierkv.facts import differing
    from tierkv.packs.build import build_config
    from tierkv.packs.pack import open_pack
    from tierkv.packs.recompute import SAMPLE_BLOCKS, recompute

    with open_pack(place, trusted=trusted, remote=remote) as opened:
        store, engine = replace(settings.store, block_tokens=opened.layout.block_tokens), settings.engine
        if engine.dtype == "auto" and opened.layout.dtype in DTYPES:
            engine = replace(engine, dtype=opened.layout.dtype)
        loaded = cli_inputs.load(model, build_config(replace(settings, store=store, engine=engine)))
        ours = facts_of(loaded.weights, loaded.tokenizer, identity=identity(loaded.weights))
        if differs := differing(opened.manifest.facts, ours):
            return None, [("model", f"not that of the pack: {', '.join(differs)}")]
        with Meter("recomputing", min(SAMPLE_BLOCKS, opened.num_blocks), unit="blocks") as meter:
            done = recompute(loaded, opened, progress=meter.add)
    wrong = [(f"row {row}", "KV that this model does not compute") for row in done.beyond]
    return {"blocks": len(done.rows), "error": done.error, "tolerance": done.tolerance}, wrong


@pack.command()
def keygen(out: Annotated[Path, typer.Argument(metavar="FILE", help="Where the new private key goes.")]) -> None:
    """Make an Ed25519 key to sign packs with, and print its public key."""
    from tierkv.packs.signing import make_key, public_file

    public = make_key(out)
    print_rows([("private key", f"{out} (keep it to yourself)"), ("public key", f"{public_file(out)}: {public}")])


@pack.command()
def sign(
    place: Annotated[Path, typer.Argument(metavar="PACK", help="Folder or zip file.")],
    key: Annotated[
        Path, typer.Option("--key", metavar="FILE", help="A private key: `tierkv pack keygen`, or openssl.")
    ],
) -> None:
    """Sign a pack, beside whoever has signed it before. What its manifest lists is checked first, but for the blocks."""
    from tierkv.packs.pack import open_pack
    from tierkv.packs.signing import read_private
    from tierkv.packs.signing import sign as sign_manifest
    from tierkv.packs.write import sign_in_place

    private = read_private(key)
    with open_pack(place, strict=False) as opened:
        manifest = opened.manifest
    made = sign_manifest(manifest.raw, private)
    others = [one for one in manifest.signatures if one.public_key != made.public_key]
    sign_in_place(place, manifest.raw, [*others, made])
    print_rows([("pack", str(place)), ("signed by", ", ".join(one.public_key for one in [*others, made]))])


for command in (push, pull, mount):
    pack.command()(command)


@pack.command()
def diff(
    left: Place,
    right: Place,
    endpoint: Endpoint = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Tell what differs between two packs: models, documents, blocks. No block is read. Exit code 1 when they differ."""
    from tierkv.packs.combine import diff as compare
    from tierkv.packs.pack import open_pack

    remote = remote_options(endpoint, config, overrides)
    with open_pack(left, strict=False, remote=remote) as one, open_pack(right, strict=False, remote=remote) as other:
        found = compare(one, other)
    if as_json:
        print_json(asdict(found))
    else:
        print_rows(
            [
                ("model", ", ".join(found.model) or "the same"),
                ("documents added", ", ".join(found.added[:SHOWN]) or "none"),
                ("documents removed", ", ".join(found.removed[:SHOWN]) or "none"),
                ("documents changed", ", ".join(found.changed[:SHOWN]) or "none"),
                ("blocks of both", f"{found.shared:,}, {found.unequal:,} of them with other bytes"),
                ("blocks of one", f"{found.left:,} of the first, {found.right:,} of the second"),
            ]
        )
    if not found.none:
        raise typer.Exit(1)


@pack.command()
def merge(
    places: Annotated[list[str], typer.Argument(metavar="PACK…", help="Packs of one model.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="PACK", help="A new folder, or a name that ends with .zip.")
    ],
    endpoint: Endpoint = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Write one pack with what several have. Signatures do not carry over: sign it anew."""
    from contextlib import ExitStack

    from tierkv.packs.combine import merge as merge_packs
    from tierkv.packs.pack import open_pack

    if len(places) < 2:
        raise ConfigError(f"{len(places)} packs given: give two or more to merge")
    remote = remote_options(endpoint, config, overrides)
    with ExitStack() as opened:
        packs = [opened.enter_context(open_pack(place, remote=remote)) for place in places]
        meter = opened.enter_context(Meter("merging", sum(one.num_blocks for one in packs), unit="blocks"))
        blocks = merge_packs(packs, out, progress=meter.add)
    print_rows([("pack", str(out)), ("blocks", f"{blocks:,}")])


def _about(manifest: "Manifest", opened: "Pack | None") -> dict[str, Any]:  # Any: JSON
    return {
        "place": opened.place if opened else None,
        "model": manifest.model_name,
        "identity": manifest.facts.identity,
        "layout": asdict(manifest.layout),
        "documents": len(manifest.documents),
        "blocks": manifest.num_blocks,
        "bytes": manifest.num_bytes,
        "signers": [one.public_key for one in manifest.signatures],
    }

"""What the commands of `tierkv pack` share: where a pack lies, who must have signed it, how servers are asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tierkv.cli_options import read_config
from tierkv.config import Config

Place = Annotated[
    str, typer.Argument(metavar="PACK", help="Folder or zip file, or a URL: s3://bucket/prefix, http://host/pack.zip.")
]
Endpoint = Annotated[
    str | None, typer.Option("--endpoint", metavar="URL", help="Of an S3-compatible server; default: pack.endpoint.")
]
Signers = Annotated[
    list[str] | None,
    typer.Option("--signer", metavar="KEY", help="A public key that must have signed it, or its file. Repeatable."),
]


def remote_options(endpoint: str | None, config: Path | None, overrides: list[str] | None) -> Any:  # Any: RemoteOptions
    """How a server is asked."""
    from tierkv.building import remote_of

    extra = [*(overrides or ()), *([f"pack.endpoint={endpoint}"] if endpoint else [])]
    return remote_of(read_config(config, extra).config)


def trusted_signers(signer: Sequence[str] | None, settings: Config) -> list[str] | None:
    """Public keys of which one must have signed; None: none must. Raises PackError or ConfigError."""
    from tierkv.building import signers_of
    from tierkv.packs.signing import read_public

    return [read_public(one) for one in signer] if signer else signers_of(settings)

"""Builds a pack: computes its blocks as `warm` does, into a store of its own beside the result, and writes them in order.

One prompt at a time, in chunks at fixed places: so a block's bytes depend on the prompts of the pack (where each parts from its
neighbour begins a chunk), the model and the machine, but not on time: two builds are the same bytes. What was computed stays
beside the result until that is written: a build that was interrupted, even killed, goes on from there.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from tierkv.assembly import LoadedModel, open_engine
from tierkv.config import Config, DaemonConfig, DiskConfig, PackConfig, RecordConfig, RedisConfig
from tierkv.engine.facts import facts_of, weights_digest
from tierkv.engine.loading import identity, layout_of
from tierkv.errors import PackError
from tierkv.keys import Namespace
from tierkv.packs.write import Model, Source, Writer, held_place, rows_of, write
from tierkv.tiers.disk_array import folder_bytes_for
from tierkv.warm.items import printable
from tierkv.warm.plan import Plan, make_plan
from tierkv.warm.rendering import Document
from tierkv.warm.run import Warmed, Warmer, chunk_tokens

READ_BLOCKS: Final = 64


def build_config(config: Config) -> Config:
    """The configuration that a pack is computed with: no tenant, no tiers but one of its own, one prompt at a time."""
    chunk = chunk_tokens(config.store.block_tokens)
    return replace(
        config,
        store=replace(config.store, tenant="", secret_file=None),
        disk=DiskConfig(),
        redis=RedisConfig(),
        daemon=DaemonConfig(),
        pack=PackConfig(),
        record=RecordConfig(),
        engine=replace(
            config.engine,
            chunk_tokens=chunk,
            max_sequences=1,
            max_batch_tokens=max(chunk, config.engine.max_batch_tokens),
        ),
    )


def model_of(loaded: LoadedModel) -> Model:
    """What is known of a loaded model."""
    named = identity(loaded.weights)
    return Model(
        name=printable(Path(loaded.name).name),
        weights_sha256=weights_digest(loaded.weights),
        facts=facts_of(loaded.weights, loaded.tokenizer, identity=named),
        layout=layout_of(loaded.weights, block_tokens=loaded.config.block_tokens),
    )


def sources_of(documents: Sequence[Document], *, block_tokens: int) -> list[Source]:
    """Documents as a pack lists them."""

    def source(document: Document) -> Source:
        text = document.text
        content = document.tokens if text is None else text.encode("utf-8", "surrogatepass")
        return Source(
            document.name,
            hashlib.sha256(content).hexdigest(),
            document.num_tokens,
            None if text is None else len(text),
            lambda number: document.span(number * block_tokens, (number + 1) * block_tokens),
        )

    return [source(document) for document in documents]


def build(
    loaded: LoadedModel,
    documents: Sequence[Document],
    out: Path,
    *,
    config: Config,
    planned: Callable[[int], None] = lambda tokens: None,
    held: Callable[[int], None] = lambda tokens: None,
    computed: Callable[[int], None] = lambda tokens: None,
) -> tuple[Plan, Warmed]:
    """Build a pack of documents at `out`; it is there unless the run was interrupted (`Warmed.interrupted`).

    loaded, config: both of `build_config`.  planned, held, computed: told of different tokens: all, those that are there of an
    earlier run, and as they are computed; the last may raise KeyboardInterrupt, to end it in good order.
    Raises PackError when there is nothing to build, `out` exists, or it cannot be written.
    """
    plan = make_plan([document.tokens for document in documents], block_tokens=loaded.config.block_tokens)
    if not plan.pieces:
        raise PackError(
            f"none of {len(documents)} documents has a whole block of {plan.block_tokens} tokens: nothing to build a pack of"
        )
    if out.exists():
        raise PackError(f"{out} exists already: give another name, or remove it")
    model = model_of(loaded)
    with held_place(out) as work:
        store_folder = work / "store"
        capacity = folder_bytes_for(plan.num_blocks, model.layout)
        own = replace(config, disk=DiskConfig(path=store_folder, capacity=capacity, policy="lru"))
        _make_room(store_folder, plan, model)
        with open_engine(loaded, own) as (engine, store):
            planned(plan.unique_tokens)
            result = Warmer(engine, store, plan, into=store.below, progress=computed, skipped=held).run()
            if result.interrupted:
                return plan, result
            tier = store.below[0].tier
            rows = rows_of(plan, store.root)
            if (kept := sum(tier.contains(rows.keys))) < plan.num_blocks:
                raise PackError(
                    f"{out}: {plan.num_blocks - kept} of {plan.num_blocks} blocks were not kept on disk: see the warnings above"
                )

            def read(numbers: Sequence[int], views: Sequence[memoryview]) -> None:
                for at in range(0, len(numbers), READ_BLOCKS):
                    keys = [rows.keys[row] for row in numbers[at : at + READ_BLOCKS]]
                    if not all(tier.read(keys, views[at : at + READ_BLOCKS])):
                        raise PackError(f"{out}: a block that was just computed cannot be read back; start again")

            writer = Writer(
                model,
                plan,
                rows,
                sources_of(documents, block_tokens=plan.block_tokens),
                read,
                built={"chunk_tokens": loaded.config.chunk_tokens, "device": loaded.config.device.partition(":")[0]},
            )
            write(out, writer)
        shutil.rmtree(work, ignore_errors=True)
    return plan, result


def _make_room(folder: Path, plan: Plan, model: Model) -> None:
    """Start anew where an earlier build beside the same name was of other prompts, or another model."""
    mark = folder.with_name("what")
    keys = b"".join(key for piece in plan.keys(Namespace(model.facts.identity, model.layout).root()) for key in piece)
    wanted = hashlib.sha256(keys).hexdigest()
    if not mark.exists() or mark.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        mark.write_text(wanted)

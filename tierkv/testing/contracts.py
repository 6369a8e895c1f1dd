# ruff: noqa: D102  (a test's name is its sentence)
"""What every codec and every policy promises."""

from collections.abc import Sequence
from gc import get_referents
from math import inf, isnan
from types import FunctionType, ModuleType

import numpy as np
import pytest

from tierkv.codecs.base import Codec
from tierkv.errors import CodecError
from tierkv.index import Index, TierSpec
from tierkv.keys import Key
from tierkv.policies.base import Leaf, Observer, Policy, Victim
from tierkv.strands import Strand


def floats(dtype: str, count: int, *, seed: int = 0) -> bytes:
    """Return `count` values like those of KV: Gaussian, in one of the dtypes of a layout."""
    values = np.random.default_rng(seed).normal(0, 1, count).astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(dtype).tobytes()


class CodecContract:
    """What every lossless codec promises. Hook: `make`."""

    def make(self, itemsize: int) -> Codec:
        """Return the codec for elements of `itemsize` bytes."""
        raise NotImplementedError

    def stored(self, codec: Codec, block: bytes) -> bytes | None:
        """Encode, and check that what is packed is smaller."""
        stored = codec.encode(memoryview(block))
        assert stored is None or len(stored) < len(block)
        return stored

    @pytest.mark.parametrize("itemsize", [1, 2, 4])
    @pytest.mark.parametrize("length", [4, 8, 64, 5120, 368640])
    @pytest.mark.parametrize("kind", ["zeros", "random", "ramp"])
    def test_blocks_come_back_bit_identical(self, itemsize: int, length: int, kind: str) -> None:
        block = {
            "zeros": bytes(length),
            "random": np.random.default_rng(length).bytes(length),
            "ramp": (np.arange(length) // 97).astype(np.uint8).tobytes(),
        }[kind]
        self.round_trip(block, itemsize)

    @pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
    def test_gaussian_floats_come_back_bit_identical(self, dtype: str, itemsize: int) -> None:
        self.round_trip(floats(dtype, 90000), itemsize)

    def round_trip(self, block: bytes, itemsize: int) -> None:
        """Encode, and decode into a buffer full of something else."""
        codec = self.make(itemsize)
        stored = self.stored(codec, block)
        if stored is not None:
            out = bytearray(b"\xa5" * len(block))
            codec.decode(memoryview(stored), memoryview(out))
            assert bytes(out) == block

    def test_hostile_bytes_raise_codec_errors_only(self) -> None:
        """A cut must be seen; a flip may decode to something else, which the checksum before the codec excludes."""
        codec = self.make(2)
        good = self.stored(codec, bytes(5000) + floats("bfloat16", 2500))
        if good is None:
            return
        out = memoryview(bytearray(10000))
        random = np.random.default_rng(7)
        for cut in [0, 1, 5, 9, 10, len(good) // 2, len(good) - 1]:
            with pytest.raises(CodecError):
                codec.decode(memoryview(good)[:cut], out)
        for _ in range(500):
            bad = bytearray(good)
            place = random.integers(12) if random.integers(2) else random.integers(len(bad))
            bad[place] ^= 1 << int(random.integers(8))
            self.decode_or_refuse(codec, bytes(bad), out)
        for _ in range(200):
            self.decode_or_refuse(codec, random.bytes(int(random.integers(400))), out)

    def decode_or_refuse(self, codec: Codec, stored: bytes, out: memoryview) -> None:
        """Decode; only CodecError may come of it."""
        try:
            codec.decode(memoryview(stored), out)
        except CodecError:
            return

    @pytest.mark.parametrize("size", [0, 2, 9998, 10002, 20000])
    def test_an_out_of_another_size_is_refused(self, size: int) -> None:
        codec = self.make(2)
        block = bytes(5000) + floats("bfloat16", 2500)
        stored = self.stored(codec, block)
        with pytest.raises(CodecError):
            codec.decode(memoryview(block if stored is None else stored), memoryview(bytearray(size)))


PROMPTS: Key = Key(b"prompts." * 4)
"""The namespace that PolicyContract uses."""


class PolicyContract:
    """What every eviction policy promises, driven by the index as a tier's own; a token is a block. Hook: `make` or `build`."""

    def make(self, tier: int) -> Policy:
        """Return a policy that knows nothing yet, for the tier of this number."""
        raise NotImplementedError

    def build(self, capacities: Sequence[int]) -> tuple[list[Policy], Observer | None]:
        """Return policies that know nothing yet, for tiers of so many blocks, and the observer that they need."""
        return [self.make(tier) for tier in range(len(capacities))], None

    def index(self, *capacities: int, history_blocks: int = 0) -> Index:
        """Return an index of tiers of these capacities."""
        policies, observer = self.build(capacities)
        specs = [
            TierSpec(f"tier {tier}", capacity, True, policy)
            for tier, (capacity, policy) in enumerate(zip(capacities, policies, strict=True))
        ]
        return Index(block_tokens=1, tiers=specs, observer=observer, history_blocks=history_blocks)

    def fill(self, prompts: Sequence[Sequence[int]], *, capacity: int = 500, history_blocks: int = 0) -> Index:
        """Return an index of one tier that has saved `prompts` in order."""
        index = self.index(capacity, history_blocks=history_blocks)
        for prompt in prompts:
            self.save(index, prompt)
        return index

    def policy(self, index: Index) -> Policy:
        """The policy of the fastest tier."""
        return index._tree.rooms[0].policy

    def victims(self, policy: Policy) -> list[Victim]:
        """All that a policy names, in its order; it has nothing to name then."""
        named = list(iter(policy.pop, None))
        assert policy.pop() is None
        return named

    def save(self, index: Index, prompt: Sequence[int]) -> None:
        """Use a prompt, and save what is missing of it as far as there is room. Uses are about a second apart."""
        tokens = np.array(prompt, "<i4").tobytes()
        now_s = float(index.match(PROMPTS, tokens).clock)
        with index.acquire(PROMPTS, tokens, now_s=now_s) as lease:
            lo = lease.num_blocks
            room = index.reserve(0, len(prompt) - lo, at_least=0)
            assert room
            index.extend(lease, tokens[4 * lo : 4 * (lo + room.count)], tier=0, places=room.places)

    def holds(self, index: Index, prompt: Sequence[int]) -> int:
        """Leading blocks of a prompt that are held; asking is no use of them."""
        return index.match(PROMPTS, np.array(prompt, "<i4").tobytes()).num_blocks

    @pytest.fixture
    def prompts(self) -> list[list[int]]:
        """Prompts that branch and come back, the same in every run."""
        random = np.random.default_rng(11)
        prompts: list[list[int]] = [[1]]
        for _ in range(100):
            old = prompts[random.integers(len(prompts))]
            prompts.append(
                old[: random.integers(1, len(old) + 1)] + random.integers(2, 9, random.integers(1, 6)).tolist()
            )
        return prompts

    def test_nothing_to_forget_is_none(self) -> None:
        assert not self.victims(self.policy(self.index(10)))

    def test_everything_unpinned_is_forgotten_in_the_end(self, prompts: list[list[int]]) -> None:
        index = self.fill(prompts)
        held = index.stats().tiers[0].held
        assert held > 100 and index.evict(0).evicted == held
        assert index.stats().num_strands == 0 and index.evict(0).evicted == 0

    def test_prefix_outlives_its_branches(self, prompts: list[list[int]]) -> None:
        index = self.fill(prompts)
        for left in range(index.stats().tiers[0].held - 1, -1, -1):
            assert index.evict(0, 1).evicted == 1
            reachable = {tuple(prompt[: at + 1]) for prompt in prompts for at in range(self.holds(index, prompt))}
            assert len(reachable) == left, "a block outlived its prefix"

    def test_pinned_path_survives(self, prompts: list[list[int]]) -> None:
        index = self.fill(prompts)
        kept = max(prompts, key=len)
        with index.acquire(PROMPTS, np.array(kept, "<i4").tobytes()) as lease:
            index.evict(0)
            assert index.stats().tiers[0].held == lease.num_blocks == self.holds(index, kept) == len(kept)
        assert index.evict(0).evicted == len(kept)

    def test_room_is_made_whenever_it_can_be(self, prompts: list[list[int]]) -> None:
        index = self.fill([], capacity=40)
        for prompt in prompts:
            self.save(index, prompt)
            assert self.holds(index, prompt) == min(len(prompt), 40)
            index.check([])

    def test_same_uses_give_the_same_order(self, prompts: list[list[int]]) -> None:
        one, other = self.fill(prompts, capacity=60), self.fill(prompts, capacity=60)
        for _ in range(60):
            assert one.evict(0, 1).evicted == other.evict(0, 1).evicted
            assert [self.holds(one, prompt) for prompt in prompts] == [self.holds(other, prompt) for prompt in prompts]

    def test_looking_ahead_changes_nothing(self, prompts: list[list[int]]) -> None:
        """`Index.spill` pops victims and offers them back."""
        one, other = self.index(60, 60), self.index(60, 60)
        for prompt in prompts:
            self.save(one, prompt)
            self.save(other, prompt)
            for lease in one.spill(0, 1, 5):
                lease.release()
            assert [self.holds(one, each) for each in prompts] == [self.holds(other, each) for each in prompts]

    def test_scan_passes_through(self) -> None:
        """What is used once must make room for what is used once later."""
        index = self.fill([[9, at] for at in range(100)], capacity=20)
        assert self.holds(index, [9, 99]) == 2 and self.holds(index, [9, 10]) == 1

    @pytest.mark.parametrize("times", [1, 2])
    def test_each_strand_is_named_once_with_what_may_go(self, prompts: list[list[int]], times: int) -> None:
        """However often it was offered; what a lease keeps is not named, nor what was forgotten."""
        index = self.fill(prompts, capacity=100)
        policy = self.policy(index)
        with index.acquire(PROMPTS, np.array(max(prompts, key=len), "<i4").tobytes()):
            index.evict(0, 20)
            spans: dict[Leaf, tuple[int, int]] = {strand: strand.span(0) for strand in index._tree.strands()}
            may_go = {strand: hi - lo for strand, (lo, hi) in spans.items() if lo < hi}
            for _ in range(2):
                named = self.victims(policy)
                assert len(named) == len(may_go) == len({strand for strand, _ in named}) > 5
                assert all(0 < blocks <= may_go[strand] for strand, blocks in named)
                for strand, _ in named * times:
                    policy.offer(strand)
        assert index.evict(0).evicted == 80

    def test_withdrawn_strand_is_not_named(self, prompts: list[list[int]]) -> None:
        index = self.fill(prompts)
        policy = self.policy(index)
        strands = [strand for strand, _ in self.victims(policy)]
        for strand in strands:
            policy.offer(strand)
        for strand in strands[::2]:
            policy.withdraw(strand)
        named = {strand for strand, _ in self.victims(policy)}
        assert named == set(strands[1::2]) and named

    def test_what_is_not_worth_forgetting_is_named_later(self, prompts: list[list[int]]) -> None:
        """Asking what a block is worth, and for something that is worth less, changes nothing."""
        asked, other = self.fill(prompts, capacity=60), self.fill(prompts, capacity=60)
        policy = self.policy(asked)
        for _ in range(60):
            strands = [strand for strand, _ in self.victims(policy)]
            for strand in strands:
                policy.offer(strand)
            worths = [policy.worth(strand, strand.size - 1) for strand in strands]
            assert not any(isnan(worth) for worth in worths)
            for below in (-inf, *worths, inf):
                if victim := policy.pop(below):
                    assert below > -inf or inf in worths, "nothing is worth less"
                    policy.offer(victim.strand)
            assert asked.evict(0, 1).evicted == other.evict(0, 1).evicted == 1
            assert [self.holds(asked, prompt) for prompt in prompts] == [
                self.holds(other, prompt) for prompt in prompts
            ]

    def test_blocks_that_are_lost_otherwise_may_come_back(self, prompts: list[list[int]]) -> None:
        """Found bad, or never arrived: the policy hears of neither."""
        random = np.random.default_rng(5)
        index = self.index(60, 40)
        for prompt in prompts:
            self.save(index, prompt)
            for lease in index.spill(0, 1, 4):
                if copy := index.begin_copy(lease, 1, lease.lo, lease.num_blocks):
                    index.commit_copy(copy, random.integers(2, size=len(copy.blocks)).astype(bool).tolist())
                lease.release()
            with index.keep(PROMPTS, np.array(prompt, "<i4").tobytes()) as lease:
                index.drop(int(random.integers(2)), lease, [int(random.integers(lease.num_blocks + 1))])
            index.check([])
        for tier in (1, 0):
            held = index.stats().tiers[tier].held
            assert index.evict(tier).evicted == held > 10

    def test_what_was_used_in_a_faster_tier_can_still_be_forgotten(self, prompts: list[list[int]]) -> None:
        index = self.index(500, 500)
        for prompt in prompts:
            self.save(index, prompt)
        for lease in index.spill(0, 1, 500):
            if copy := index.begin_copy(lease, 1, lease.lo, lease.num_blocks):
                index.commit_copy(copy, [True] * len(copy.blocks))
            lease.release()
        for prompt in prompts:
            self.save(index, prompt)
        held = index.stats().tiers[1].held
        assert index.evict(1).evicted == held > 50

    @pytest.mark.parametrize("history_blocks", [0, 200])
    def test_memory_is_bounded_by_what_the_tier_holds(self, history_blocks: int) -> None:
        """However many requests there were: those that need room, those that find everything, and losses."""
        index = self.fill([], capacity=50, history_blocks=history_blocks)
        policy, most = self.policy(index), [0, 0]
        for at in range(1200):
            self.save(index, [at % 5, at, at % 3] if at // 200 % 2 else [at % 4, at % 9, at % 2])
            if at % 7 == 0:
                with index.keep(PROMPTS, np.array([at % 5, at], "<i4").tobytes()) as lease:
                    index.drop(0, lease, [1])
            if at % 40 == 0:
                most[at >= 500] = max(most[at >= 500], _num_objects(policy))
        assert most[1] <= 1.5 * most[0] and most[1] < 100 * (50 + history_blocks)


def _num_objects(thing: object) -> int:
    """How many objects one keeps, each time that it does; what a strand keeps is the index's."""
    seen: set[int] = set()
    count, stack = 0, [thing]
    while stack:
        kept = stack.pop()
        count += 1
        if id(kept) not in seen and not isinstance(kept, Strand | type | ModuleType | FunctionType):
            seen.add(id(kept))
            stack += get_referents(kept)
    return count

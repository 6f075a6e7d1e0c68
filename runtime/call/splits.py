"""How many blocks share one tile's work: pure functions, on the host, of what is known without asking the device."""

from __future__ import annotations

from functools import lru_cache

from registry.contract import WINDOW_OPEN, Variant

MAX_SPLITS = 256
# In units of the time in which a multiprocessor reads one key block when all of them read. docs/tuning.md has the
# measurements behind them.
ALONE, ALONE_HEAVY = 2.5, 5.0  # a step of a block that has its multiprocessor for itself: latency, not bandwidth
QUARTERS, STEP_HEAVY = 4, 4.4  # heavy steps: a block on each quarter of a multiprocessor costs as much as one alone
BLOCK = 2.0  # steps that a block's start and end take, with its partial output
COMBINE = 8.0  # the launch that combines
PARTIAL = 0.1  # and what each split adds to it
ENOUGH = 0.02  # more splits must be better by this part
SPLIT_GAIN = 0.1  # of the backward's time, for which its partial sums are put up with
LIGHT_BYTES = 257  # of a key and its value in one head: with fewer, reading them takes no longer than computing


@lru_cache(maxsize=4096)
def num_splits(units: int, key_blocks: int, multiprocessors: int, blocks_each: int, heavy: bool = False) -> int:
    """1, or the number of splits with which a call is expected to end first.

    units: blocks without splits. key_blocks: of keys, that a unit may visit. blocks_each: that a multiprocessor holds
    at once. heavy: computing takes as long as reading. Blocks run in rounds that fill the device; the last may leave
    some multiprocessors with fewer blocks, which then run faster, down to what latency allows.
    """
    if min(units, multiprocessors, blocks_each) < 1:
        return 1
    slots, full = multiprocessors * blocks_each, _step(blocks_each, heavy)
    best, least = 1, 0.0
    for splits in range(1, max(1, min(MAX_SPLITS, key_blocks)) + 1):
        rounds, rest = divmod(units * splits, slots)
        last = _step(-(-rest // multiprocessors), heavy) if rest else 0.0
        time = (-(-key_blocks // splits) + BLOCK) * (rounds * full + last)
        time += COMBINE + PARTIAL * splits if splits > 1 else 0.0
        if splits == 1 or time < least * (1 - ENOUGH):
            best, least = splits, time
    return best


def _step(blocks: int, heavy: bool) -> float:
    """Time of one key block in each of the blocks that share a multiprocessor."""
    return max(STEP_HEAVY * -(-blocks // QUARTERS), ALONE_HEAVY) if heavy else max(float(blocks), ALONE)


def is_heavy(variant: Variant) -> bool:
    """Whether a variant's decode computes for as long as it reads: small heads, and caches that it widens."""
    size = 1 if "e4m3kv" in variant.features else 2
    return size == 1 or (variant.head_dim + variant.head_dim_v) * size < LIGHT_BYTES


def visible_keys(seqlen_q: int, seqlen_k: int, window: tuple[int, int]) -> int:
    """How many of seqlen_k keys seqlen_q consecutive queries may see at most. window: as the kernels take it."""
    left, right = window
    if left >= WINDOW_OPEN:
        return seqlen_k
    return min(seqlen_k, left + seqlen_q + min(right, seqlen_k))


def group_splits(blocks: int, group: int, multiprocessors: int, blocks_each: int, causal: bool = False) -> int:
    """How many blocks share the query heads of a key/value head: a divisor of group.

    Blocks of equal length run in waves of as many as the device holds; of s splits each takes 1 / s of the time. Under
    a causal mask their times go from zero to that, the longest first. The estimate then is the larger of the longest
    block's time and the average load, half that of blocks of equal length. More splits, whose sums have to be added up,
    must save SPLIT_GAIN of the time.
    blocks: of the backward without splits. blocks_each: that a multiprocessor holds at once.
    """
    resident, best = max(multiprocessors * blocks_each, 1), 1

    def time(splits: int) -> float:
        return max(1 / splits, blocks / resident / 2) if causal else -(-blocks * splits // resident) / splits

    for splits in range(2, group + 1):
        if blocks and group % splits == 0 and time(splits) < (1 - SPLIT_GAIN) * time(best):
            best = splits
    return best

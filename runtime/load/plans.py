"""What one thread keeps for calls that look alike, dropped with the configuration that it was made in."""

from __future__ import annotations

import threading
from typing import Any, Protocol

MAX_PLANS = 1024  # that a thread keeps; the oldest goes first
MAX_SIZES = 64  # plans of one family: calls that differ in lengths alone


class Kept(Protocol):
    """What is kept. key: of the calls that it serves now. family: of all that it could be made to serve."""

    key: Any
    family: Any


class Plans(threading.local):
    """One thread's plans by a call's key. A shared parameter buffer would race: bindings drop the GIL in a launch."""

    def __init__(self) -> None:
        self.by_call: dict[Any, Any] = {}
        self.families: dict[Any, list[Any]] = {}  # the one that was made or changed longest ago comes first

    def keep(self, plan: Kept) -> None:
        """Under the plan's key and family."""
        if len(self.by_call) >= MAX_PLANS:
            self.forget(next(iter(self.by_call.values())))
        self.families.setdefault(plan.family, []).append(plan)
        self.by_call[plan.key] = plan

    def forget(self, plan: Kept) -> None:
        """An interrupt may come between any two lines here and in `keep`: what is already gone is no error."""
        self.by_call.pop(plan.key, None)
        rest = [other for other in self.families.get(plan.family, ()) if other is not plan]
        if rest:
            self.families[plan.family] = rest
        else:
            self.families.pop(plan.family, None)

    def to_change(self, family: Any) -> Any | None:
        """A plan for a call with other lengths, no longer kept: of a family that has as many as it may, or where
        another family would have to give one up."""
        found: list[Any] = self.families.get(family, [])
        if not found or (len(found) < MAX_SIZES and len(self.by_call) < MAX_PLANS):
            return None
        plan = found[0]
        self.forget(plan)
        return plan


plans = Plans()


def drop() -> None:
    """Forget every thread's plans; calls in flight finish with theirs."""
    global plans
    plans = Plans()

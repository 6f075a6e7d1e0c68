"""New plans: the kernel that serves some facts, loaded if need be, and the times of its first uses."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from runtime import stages
from runtime.call import launch
from runtime.load.kernel import Kernel
from runtime.load.session import Session


def make(now: Session, op: str, facts: dict[str, Any], device: int,
         build: Callable[[Kernel, bool], launch.Plan]) -> launch.Plan:  # fmt: skip
    """What `build` makes of the kernel, and of whether its dispatch row packs heads, with the device's context current.

    A kernel's first plan and launch go to the ledger. Raises CaptureError, NoKernelError, … as Session.kernel does.
    """
    backend = now.backend
    capturing = backend.is_capturing()  # asked before the guard too: another device's capture forbids a load as well
    with backend.guard(device):
        kernel, packs, fresh = now.kernel(op, facts, device, capturing or backend.is_capturing())
        start = perf_counter()
        with backend.driver.context(device):  # this thread may have none, though another has loaded the kernel
            plan = build(kernel, packs)
    if fresh:
        stages.record("plan", kernel.artifact.variant, (perf_counter() - start) * 1e3)
        _time_first_launch(plan, kernel.artifact.variant)
    return plan


def _time_first_launch(plan: launch.Plan, variant: str) -> None:
    fire = plan.fire

    def first(stream: int, params: int, extra: int) -> tuple[Any]:
        plan.fire = fire
        with stages.stage("first launch", variant):
            return fire(stream, params, extra)

    plan.fire = first

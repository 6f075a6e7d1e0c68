"""Plan → compile → assemble → inspect → store → index. One process writes the registry; workers do the rest."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder import checks, misplaced
from builder.errors import ToolchainError
from builder.examine import Candidate, artifact, examine
from builder.toolchain import DSL_ARCH, Toolchain, broken, closure
from builder.verified import Verified
from builder.worker import TIME_LIMIT, Answer, Pool, Task
from registry import __version__, ops
from registry.contract import FORMAT, PARTED, Abi, Artifact, ContractError, DispatchRow, Index, Variant, sha256_hex
from registry.store import ConflictError, Store

BATCH = 16  # cubins of one architecture that share an nvdisasm run


@dataclass(frozen=True)
class Table:
    """What to build. sources: op → the modules whose import closure shapes its PTX; generator: 'module:function',
    called in a worker as `generate(variant, dump_dir)` and giving ptx, symbol, threads, smem and grid; target: what a
    variant's PTX is for."""

    variants: tuple[Variant, ...]
    rows: tuple[DispatchRow, ...]
    abis: Mapping[str, Abi]
    sources: Mapping[str, tuple[str, ...]]
    generator: str
    folder: Path | None = None  # where the sources lie, if not beside the builder
    target: Callable[[Variant], str] = lambda variant: DSL_ARCH

    @classmethod
    def ours(cls) -> Table:
        """The dispatch table of `kernels/`. ToolchainError if another project's `kernels` is in the way, or ours does
        not parse."""
        if problem := misplaced("kernels"):
            raise ToolchainError(problem)
        try:
            from kernels import dispatch, generate, parts
        except SyntaxError as error:
            raise broken(error, error.filename) from None
        sources = {op: (parts.name(op, parts.KERNEL),) for op in ops.OPS}
        abis = {name: ops.get(name).abi for name in ops.OPS}
        generator = f"{generate.__name__}:generate"
        return cls(dispatch.variants(), dispatch.rows(), abis, sources, generator, target=_target)

    def source_hashes(self, op: str) -> dict[str, str]:
        return closure(self.sources[op]) if self.folder is None else closure(self.sources[op], folder=self.folder)


def _target(variant: Variant) -> str:
    return ops.get(variant.op).target(variant.features)


@dataclass
class Job:
    """One variant of the plan. missing: architectures without an artifact of the current fingerprint."""

    variant: Variant
    ptx_fingerprint: str
    fingerprints: dict[str, str]  # arch → artifact fingerprint
    missing: tuple[str, ...] = ()
    reasons: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.variant.key


@dataclass
class Result:
    """What a build did. built + cached + failed are the `variants` selected, unless it was interrupted.

    artifacts: of the selected variants, by (variant key, arch). unverified: indexed variants, selected or not, that
    the ledger does not show as verified; verified: on which architectures it shows each of them, None if that was not
    asked for. indexes: arch → digest, indexed: arch → how many variants. moved: the
    architectures whose channel points at the new index now. lacking: those whose channel was left alone because its
    index has these variants of the table and the new one has not. formats: where the channel's index was of another
    format than this release writes, that format's number; an older one is replaced, a newer one only if allowed.
    """

    variants: int
    artifacts: dict[tuple[str, str], Artifact] = field(default_factory=dict)
    built: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unverified: dict[str, str] = field(default_factory=dict)
    verified: dict[str, list[str]] | None = None
    indexes: dict[str, str] = field(default_factory=dict)
    indexed: dict[str, int] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)
    lacking: dict[str, list[str]] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def plan(table: Table, archs: Sequence[str], toolchain: Toolchain, store: Store | None) -> list[Job]:
    """A job for every variant of the table, with what `store` lacks of it. None stands for an empty store."""
    hashes = {op: table.source_hashes(op) for op in {v.op for v in table.variants}}
    jobs = []
    for variant in table.variants:
        ptx = toolchain.ptx_fingerprint(variant.key, hashes[variant.op])
        abi = table.abis[variant.op].digest
        wanted = {arch: toolchain.artifact_fingerprint(ptx, arch, abi) for arch in archs}
        missing = tuple(a for a in archs if store is None or store.get_artifact(wanted[a]) is None)
        jobs.append(Job(variant, ptx, wanted, missing))
    return jobs


class Build:
    """One run over a store. `select` picks the variants to build; the index covers the whole table regardless.

    result: what `run` did, also when it was interrupted; None before it.
    """

    result: Result | None = None

    def __init__(self, table: Table, archs: Sequence[str], store: Store, *, toolchain: Toolchain | None = None):
        self.table, self.archs, self.store = table, tuple(dict.fromkeys(archs)), store
        self.toolchain = toolchain or Toolchain.current()
        self.jobs = {job.key: job for job in plan(table, self.archs, self.toolchain, store)}
        self._pending: dict[str, list[Candidate]] = {arch: [] for arch in self.archs}

    def run(
        self,
        select: Callable[[Variant], bool] = lambda variant: True,
        *,
        jobs: int = 1,
        channel: str = "stable",
        verified: Verified | None = None,
        allow_partial: bool = False,
        progress: Callable[[int, int, str], None] = lambda done, total, key: None,
        time_limit: float = TIME_LIMIT,
    ) -> Result:
        """Build what is missing, index what is there, and move the channel if nothing failed.

        verified: require every indexed variant to be verified. allow_partial: move a channel even to an index that
        lacks variants of the table which its current one has. progress(done, total, key) is called as variants end.
        time_limit: seconds that one variant may take. Raises StoreError; a variant's own faults go to `failed`.
        Whatever ends it, variants that were finished are in the store.
        """
        started = time.monotonic()
        self._claim()
        chosen = [job for job in self.jobs.values() if select(job.variant)]
        todo = [job for job in chosen if job.missing]
        result = self.result = Result(len(chosen))
        try:
            progress(0, len(todo), "")
            if todo:
                self._make(todo, min(jobs, len(todo)), progress, time_limit)
        finally:
            stored = self._stored()
            self._count(result, chosen, stored)
            result.seconds = time.monotonic() - started
        if verified is not None:
            result.unverified = unverified(stored, verified)
            result.verified = verified_on(stored, verified)
        self._index(result, stored, channel, allow_partial)
        result.seconds = time.monotonic() - started
        return result

    def _claim(self) -> None:
        """Note what the sources stand for, so that gc leaves it; only then does what is stored count as there."""
        jobs = self.jobs.values()
        for arch in self.archs:
            self.store.set_wanted(arch, {f for job in jobs for f in (job.ptx_fingerprint, job.fingerprints[arch])})
        for job in jobs:
            job.missing = tuple(a for a in self.archs if self.store.get_artifact(job.fingerprints[a]) is None)

    def _make(self, todo: list[Job], jobs: int, progress: Callable[[int, int, str], None], time_limit: float) -> None:
        try:
            with Pool(jobs, time_limit) as pool:
                for done, answer in enumerate(pool.run([self._task(job) for job in todo]), 1):
                    self._take(self.jobs[answer.key], answer)
                    progress(done, len(todo), answer.key)
        finally:  # an interruption costs a second more, and nothing that was made
            for arch in self.archs:
                self._settle(arch)

    def _task(self, job: Job) -> Task:
        stored = self.store.get_ptx(job.ptx_fingerprint)
        return Task(job.key, job.missing, self.table.generator, stored.ptx if stored else None)

    def _take(self, job: Job, answer: Answer) -> None:
        """Check and store what a worker made; its cubins wait for their nvdisasm run."""
        if answer.error is not None or answer.ptx is None:
            job.reasons.append(answer.error or "worker: gave no PTX")
            return
        facts = answer.facts or self._stored_facts(job)
        job.reasons += checks.ptx_reasons(
            answer.ptx, facts, self.table.abis[job.variant.op], self.table.target(job.variant)
        )
        if job.reasons:
            return
        if answer.facts and not self._kept(
            job, self.store.put_ptx, job.ptx_fingerprint, job.key, answer.ptx, answer.facts
        ):
            return
        job.reasons += answer.errors.values()
        ptx_sha256 = sha256_hex(answer.ptx.encode())
        for arch, cubin in answer.cubins.items():
            self._pending[arch].append(Candidate(job.key, cubin, facts, ptx_sha256))
            if len(self._pending[arch]) >= BATCH:
                self._settle(arch)

    def _stored_facts(self, job: Job) -> dict[str, Any]:
        stored = self.store.get_ptx(job.ptx_fingerprint)
        assert stored is not None  # the task was made of it
        return stored.facts

    def _settle(self, arch: str) -> None:
        """Examine the cubins that wait, and store those that pass."""
        waiting = self._pending[arch]
        for candidate, found in examine(tuple(waiting), arch):
            job = self.jobs[candidate.key]
            if isinstance(found, list):
                job.reasons += found
            else:
                made = artifact(candidate, found, arch, self.table.abis[job.variant.op], self.toolchain)
                self._kept(job, self.store.put_artifact, job.fingerprints[arch], made, candidate.cubin.frame)
            waiting.remove(candidate)  # not before: an interruption leaves the rest to be settled

    def _kept(self, job: Job, put: Callable[..., object], *arguments: object) -> bool:
        """Store; that another build stored something else under the same fingerprint is this variant's fault alone."""
        try:
            put(*arguments)
            return True
        except ConflictError as error:
            job.reasons.append(f"{error.reason}: {error}")
            return False

    def _stored(self) -> dict[tuple[str, str], Artifact]:
        """Every artifact of the table that is in the store, by (variant key, arch)."""
        return {(job.key, arch): a for job in self.jobs.values() for arch, f in job.fingerprints.items()
                if (a := self.store.get_artifact(f)) is not None}  # fmt: skip

    def _count(self, result: Result, chosen: Sequence[Job], stored: Mapping[tuple[str, str], Artifact]) -> None:
        for job in chosen:
            if job.reasons:
                result.failed[job.key] = "; ".join(job.reasons)
            elif all((job.key, arch) in stored for arch in self.archs):
                (result.built if job.missing else result.cached).append(job.key)
        keys = {job.key for job in chosen}
        result.artifacts = {at: a for at, a in stored.items() if at[0] in keys}

    def _index(
        self, result: Result, stored: Mapping[tuple[str, str], Artifact], channel: str, allow_partial: bool
    ) -> None:
        """Write each architecture's index of all that is stored; its channel moves if nothing failed or gets lost."""
        abis = tuple(self.table.abis.values())
        for arch in self.archs:
            artifacts = tuple(a for (_, at), a in stored.items() if at == arch)
            if not artifacts:
                continue
            index = Index(arch, __version__, artifacts, self.table.rows, abis)
            body = self.store.get_index(self.store.channel(channel).get(arch, "")) or b""
            if (number := other_format(body)) is not None:
                result.formats[arch] = number
            newer = number is not None and number > PARTED
            lacking = [] if allow_partial else self._lacking(index, body)
            move = not (result.failed or result.unverified or lacking or (newer and not allow_partial))
            result.indexes[arch] = self.store.put_index(index, channel if move else None)
            result.indexed[arch] = len(artifacts)
            if move:
                result.moved.append(arch)
            if lacking:
                result.lacking[arch] = lacking

    def _lacking(self, index: Index, body: bytes) -> list[str]:
        """Variants of the table that the channel's index, of these bytes, has and `index` has not."""
        try:
            current = self.store.read_index(body).by_variant.keys() if body else set()
        except ContractError:  # of a format that this release does not read
            return []
        return sorted((current & self.jobs.keys()) - index.by_variant.keys())


def other_format(body: bytes) -> int | None:
    """The format that an index states, if it is another than ours; 0 if it states none. None for no index at all."""
    if not body:
        return None
    try:
        number = json.loads(body)["format"]
    except (ValueError, KeyError, TypeError):
        return 0
    return None if number in (FORMAT, PARTED) else number if type(number) is int else 0


def unverified(artifacts: Mapping[tuple[str, str], Artifact], verified: Verified) -> dict[str, str]:
    """Variant key → reason, for every artifact whose PTX the ledger does not show as verified."""
    reasons = {}
    for (key, _), a in artifacts.items():
        if lacking := verified.lacking(a.ptx_sha256, Variant.parse(key).op):
            reasons[key] = f"PTX {a.ptx_sha256}: {'; '.join(lacking)}"
    return reasons


def verified_on(artifacts: Mapping[tuple[str, str], Artifact], verified: Verified) -> dict[str, list[str]]:
    """Variant key → the architectures on which the ledger shows its PTX as verified, whichever it is built for."""
    return {key: verified.architectures(a.ptx_sha256, Variant.parse(key).op) for (key, _), a in artifacts.items()}

"""What an op is, as data: its tensors, scalars, tile, grid and facts. Everything that can be derived is derived here.

One file beside this one describes one op. From it follow the kernel's ABI, the checks of a call's tensors, the
parameters of a launch, what builder and benchmarks build together, `explain`, and the tables of docs/design.md.
What needs judgement stays written by hand: rules across arguments (`runtime.call.forward`), which tiles can be built
(`kernels.<op>.table`), device code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property

from registry.contract.abi import PARAM_FORMATS, Abi, Param
from registry.contract.errors import ContractError
from registry.contract.grid import GRID_RULES
from registry.contract.record import Record, derived
from registry.contract.storage import ALL_DTYPES, DTYPES

ROLES = ("in", "out", "inout", "workspace")
# How a kernel reads or writes a tensor, and so what its strides and address must be: pieces of 16 bytes along the last
# dimension; element by element along a contiguous last dimension; element by element anywhere.
ACCESSES = ("vectors", "elements", "anywhere")
TENSOR_DTYPES = (*ALL_DTYPES, "e4m3", "i32")
CALL = "call"


class Layout(Record):
    """One shape that a tensor may have: names of its dimensions. 'batch + 1' is one more than batch.

    when: the optional tensor that must be given for this layout; '' for none. unless: the one that must not be. axes:
    what axis each dimension is. text: as errors and documents write it, '(batch, seqlen_q, heads_q, head_dim)'.
    """

    dims: tuple[str, ...]
    when: str = ""
    unless: str = ""
    axes: tuple[str, ...] = derived()
    text: str = derived()

    def __post_init__(self) -> None:
        text = f"({', '.join(self.dims)}{',' if len(self.dims) == 1 else ''})"
        self._derive(text=text, axes=tuple(map(axis_of, self.dims)))


class Tensor(Record):
    """A tensor that an op reads or writes, behind one pointer of its ABI.

    role: 'in', 'out', 'inout', or 'workspace', which no caller sees. dtypes: of TENSOR_DTYPES; CALL for the call's
    dtype, which is that of its first tensor; or the name of another tensor, whose dtype this one has. strides: axes
    whose strides, in elements, are parameters of the kernel; of a tensor of `access` 'vectors' they are multiples of 16
    bytes. argument: set where the public functions have another name for it; public: the name that they have.
    parameters: axis -> the parameter that holds its stride. gradient_of: of a workspace (key_tiles, heads_q), the
    argument whose gradient is the sum over an entry's tiles.
    """

    name: str
    role: str
    dtypes: tuple[str, ...]
    layouts: tuple[Layout, ...]
    about: str
    strides: tuple[str, ...] = ()
    access: str = "elements"
    optional: bool = False
    differentiable: bool = False
    argument: str = ""
    gradient_of: str = ""
    public: str = derived()
    parameters: dict[str, str] = derived()

    def __post_init__(self) -> None:
        parameters = {axis: stride(self.name, axis) for axis in self.strides}
        self._derive(parameters=parameters, public=self.argument or self.name)
        if self.role not in ROLES or self.access not in ACCESSES or not self.layouts:
            raise ContractError(f"tensor {self.name}: role {self.role!r}, access {self.access!r}, {self.layouts}")


class Scalar(Record):
    """A number among an op's parameters. source: set where it has another name among a call's numbers; origin: the name
    that it has there."""

    name: str
    type: str
    about: str
    source: str = ""
    origin: str = derived()

    def __post_init__(self) -> None:
        self._derive(origin=self.source or self.name)
        if self.type not in PARAM_FORMATS or self.type == "ptr":
            raise ContractError(f"scalar {self.name}: {self.type!r} is no type of a number")


class Letter(Record):
    """One part of a tile as a variant's key writes it, such as 'm128'. values: a regular expression."""

    letter: str
    about: str
    values: str = r"\d+"
    optional: bool = False


class Fact(Record):
    """What a dispatch row may ask of a call."""

    name: str
    about: str


class Feature(Record):
    """A compile-time choice of a variant beside its tile. ptx: the PTX target that it needs; '' for the op's own."""

    name: str
    about: str
    ptx: str = ""


class Op(Record):
    """A kernel's role, described once. A variant of it is a dtype, head dims, a tile and features.

    computes: what a block does. grid: rule of registry.contract.Grid. ptx: the target that its PTX is written for;
    features: optional compile-time switches. launched_with: the ops that a call launches beside this one. after: ops
    that must have run before: for `bwd`, `fwd`. shared_by: the scalar that holds the number of splits; '' for an op
    that does not split. backward: the op that computes its gradients; '' where there are none, and then no_gradient
    says of what, for an error. facts: what its dispatch rows may ask. The first tensors of `fwd` are q, k, v, o and
    lse, which lead the parameters: the hot path writes them alone. A change of tensors or scalars raises `version`.

    Derived when a description is made, since every call looks it up: abi has pointers first, as they change with every
    call, then strides and numbers by size, i64, i32, f32; slots are the names of the pointers, whose addresses every
    call writes; by_argument are the tensors that callers give, by the public functions' names.
    """

    name: str
    version: int
    computes: str
    tensors: tuple[Tensor, ...]
    scalars: tuple[Scalar, ...]
    letters: tuple[Letter, ...]
    grid: str
    facts: tuple[Fact, ...]
    ptx: str = "sm_80"
    dtypes: tuple[str, ...] = DTYPES
    features: tuple[Feature, ...] = ()
    launched_with: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    shared_by: str = ""
    backward: str = ""
    no_gradient: str = ""
    abi: Abi = derived()
    slots: tuple[str, ...] = derived()
    by_argument: dict[str, Tensor] = derived()

    def __post_init__(self) -> None:
        names = [t.name for t in self.tensors]
        known = {*names, *TENSOR_DTYPES, CALL}
        for tensor in self.tensors:
            if wrong := [d for d in tensor.dtypes if d not in known]:
                raise ContractError(
                    f"{self.name}: tensor {tensor.name} has the dtype of {wrong[0]!r}, which is nobody's"
                )
        if self.grid not in GRID_RULES:
            raise ContractError(f"{self.name}: grid {self.grid!r} is none of {', '.join(GRID_RULES)}")
        by_argument = {t.public: t for t in self.tensors if t.role != "workspace"}
        pointers = [Param(t.name, "ptr") for t in self.tensors]
        strides = [Param(name, "i64") for t in self.tensors for name in t.parameters.values()]
        numbers = [Param(s.name, s.type) for kind in ("i64", "i32", "f32") for s in self.scalars if s.type == kind]
        abi = Abi(self.name, self.version, (*pointers, *strides, *numbers))
        self._derive(slots=tuple(names), by_argument=by_argument, abi=abi)

    @cached_property
    def tile(self) -> re.Pattern[str]:
        """What a tile and its features look like in a variant's key."""
        text = ""
        for part in self.letters:
            one = f"{'-' if text else ''}{part.letter}(?:{part.values})"
            text += f"(?:{one})?" if part.optional else one
        return re.compile(text + "".join(f"(?:-{feature.name})?" for feature in self.features))

    @cached_property
    def tile_form(self) -> str:
        """The same for people, such as 'm…-n…-w…-s…[-q…]'."""
        one = [f"{'-' if n else ''}{part.letter}…" for n, part in enumerate(self.letters)]
        letters = [f"[{text}]" if part.optional else text for text, part in zip(one, self.letters, strict=True)]
        return "".join([*letters, *(f"[-{feature.name}]" for feature in self.features)])

    def target(self, features: Iterable[str] = ()) -> str:
        """The PTX target of a variant with these features."""
        needs = [f.ptx for f in self.features if f.name in features and f.ptx]
        return max([self.ptx, *needs], key=lambda arch: int(arch.removeprefix("sm_")))


def stride(tensor: str, axis: str) -> str:
    """Name of the parameter that holds a tensor's stride along an axis: b batch, s tokens, h heads, split."""
    return f"{tensor}_stride_{axis}"


def axis_of(dim: str) -> str:
    """The axis that a dimension of a layout is, '' for one whose stride no kernel takes."""
    if dim in ("batch", "pages"):
        return "b"
    if dim in ("tokens", "page_size") or dim.startswith(("seqlen", "total_")):
        return "s"
    return "split" if dim == "splits" else "h" if dim.startswith("heads") else ""


def layout(dims: str, when: str = "", unless: str = "") -> Layout:
    """layout('batch heads_q'); 'batch+1' is one more than batch, 'rotary_dim/2' half of rotary_dim."""
    return Layout(tuple(re.sub(r"([+/])", r" \1 ", dim) for dim in dims.split()), when, unless)

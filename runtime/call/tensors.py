"""A call's tensors: what the ops' descriptions ask of them, and what follows. Each refusal names the argument.

`check` is all of it; the other functions are its parts, and what other modules check in the same words.
"""

from collections.abc import Container, Iterable, Mapping
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

from registry import ops
from registry.ops.attention import LENGTHS
from registry.ops.describe import CALL, Layout, Tensor
from runtime.call.plain import flag
from runtime.errors import ArgumentError

TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "i32": "int32", "e4m3": "float8_e4m3fn"}
TOTALS = ("total_q", "total_k")
FIRST = ("q", "cu_seqlens_q")  # these say what a call's batch is; all others must agree
ALIGNMENT = 16  # bytes that one copy of the kernels moves, along head_dim; other tensors are read by elements
STRIDE = 8  # elements: the same of 16-bit numbers
APPENDED = ("k_new", "v_new")  # what goes behind a cache's tokens
MAX_HEAD_DIM = 256
MAX_I32 = 2**31 - 1
Numbers = dict[str, int | float]  # of kernels' scalars and strides, by name


# -- what the descriptions say ----------------------------------------------------------------------------------------


ONE = ("",)  # no size is called so: `strides_of_new` takes it for 1, which has the stride 0


class Dim(NamedTuple):
    """A dimension with n entries makes the size `name` n · times − plus: 'batch + 1' has plus 1, 'rotary_dim / 2' has
    times 2."""

    name: str
    times: int = 1
    plus: int = 0


class Form(NamedTuple):
    """A tensor of so many dimensions. steps: (parameter of the kernel, the dimension whose stride it is, or -1).
    contiguous: the dimensions, but for the last, whose stride is no parameter."""

    dims: tuple[Dim, ...]
    text: str
    steps: tuple[tuple[str, int], ...]
    contiguous: tuple[int, ...]


class Expected(NamedTuple):
    """What a tensor must be in a call with certain others. forms: by the number of dimensions."""

    tensor: Tensor
    forms: dict[int, Form]


class New(NamedTuple):
    """An output that a call makes, contiguous. dims: all of one layout. steps: (parameter, the dimensions from its own
    on), none for an axis that the layout has not."""

    dims: frozenset[str]
    steps: tuple[tuple[str, tuple[str, ...]], ...]


class Absent(NamedTuple):
    """What is not given: zeros for the strides of optional tensors, and every layout of each output."""

    zeros: dict[str, int | float]
    new: tuple[New, ...]


@cache
def described(op: str) -> dict[str, Tensor]:
    """What a call may be given: the tensors of an op, and of those that are launched with it, by public name."""
    found: dict[str, Tensor] = {}
    for name in (op, *ops.get(op).launched_with):
        found = {**ops.get(name).by_argument, **found}
    return found


@lru_cache(maxsize=256)
def expected(op: str, given: tuple[str, ...]) -> dict[str, Expected]:
    """By name, for a call with the tensors `given`. ArgumentError for one that the op does not take."""
    for name in given:
        if name not in described(op):
            raise ArgumentError(name, f"is not taken by {op}, must be None", reason="unsupported")
    return {name: _expected(described(op)[name], given) for name in given}


def _expected(tensor: Tensor, given: tuple[str, ...]) -> Expected:
    forms = {}
    for layout in layouts(tensor, given):
        places = {axis: place for place, axis in enumerate(layout.axes)}
        steps = tuple([(parameter, places.get(axis, -1)) for axis, parameter in tensor.parameters.items()])
        text = f"{layout.text}{f' with {layout.when}' if layout.when else ''}"
        taken = {place for _, place in steps}
        contiguous = tuple([place for place in range(len(layout.dims) - 1) if place not in taken])
        forms[len(layout.dims)] = Form(tuple(map(_dim, layout.dims)), text, steps, contiguous)
    return Expected(tensor, forms)


def layouts(tensor: Tensor, given: Container[str]) -> list[Layout]:
    """The layouts that a tensor may have in a call with the tensors `given`."""
    return [
        layout
        for layout in tensor.layouts
        if (not layout.when or layout.when in given) and not (layout.unless and layout.unless in given)
    ]


def _dim(text: str) -> Dim:
    """Of 'batch', 'batch + 1' or 'rotary_dim / 2'."""
    if text.endswith(" + 1"):
        return Dim(text.removesuffix(" + 1"), plus=1)
    return Dim(text.removesuffix(" / 2"), times=2) if text.endswith(" / 2") else Dim(text)


@lru_cache(maxsize=256)
def absent(op: str, given: tuple[str, ...]) -> Absent:
    zeros: dict[str, int | float] = {}
    new: list[New] = []
    for name, tensor in described(op).items():
        if name in given:
            continue
        if tensor.role == "in":
            zeros |= dict.fromkeys(tensor.parameters.values(), 0)
            continue
        for layout in layouts(tensor, given):
            inside = {axis: layout.dims[place:] for place, axis in enumerate(layout.axes)}
            steps = tuple([(parameter, inside.get(axis, ONE)) for axis, parameter in tensor.parameters.items()])
            new.append(New(frozenset(layout.dims), steps))
    return Absent(zeros, tuple(new))


# -- checks -----------------------------------------------------------------------------------------------------------


class Checked(NamedTuple):
    """What is left of tensors that were checked: sizes of their dimensions, strides by the kernels' parameters."""

    sizes: dict[str, int]
    strides: Numbers


def check(op: str, tensors: Mapping[str, Any], torch: Any, device_type: str) -> Checked:
    """Everything that the descriptions ask."""
    check_kinds(op, tensors, torch, device_type)
    found = sizes(op, tensors)
    _check_head_dims(tensors, found)
    check_memory(op, tensors)
    check_tangents(torch.autograd.forward_ad, tensors.items())
    return Checked(found, strides(op, tensors, found))


def check_kinds(op: str, tensors: Mapping[str, Any], torch: Any, device_type: str) -> None:
    """Types, layouts in memory, dtypes, ranks and devices: what no size changes."""
    for name, wanted in expected(op, tuple(tensors)).items():
        _check_tensor(name, tensors[name], torch, device_type, wanted.forms)
        _check_dtype(name, wanted.tensor, tensors, torch)
    (first, tensor), *others = tensors.items()
    device, table = tensor.device, expected(op, tuple(tensors))
    choices = list(table[first].forms)  # where there are several, the first tensor's is everyone's
    for name, other in others:
        if other.device != device:
            raise ArgumentError(name, f"is on {other.device}, must be on {first}'s device, {device}", reason="device")
        if len(choices) == len(table[name].forms) > 1:
            rank, form = list(table[name].forms.items())[choices.index(tensor.dim())]
            if other.dim() != rank:
                message = f"{other.dim()} dimensions, must be the {rank} of {form.text}, as {first} has {tensor.dim()}"
                raise ArgumentError(name, message, reason="rank")


def _check_tensor(name: str, tensor: Any, torch: Any, device_type: str, forms: Mapping[int, Form]) -> None:
    """A plain tensor of one of these ranks on the right kind of device."""
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(name, f"{type(tensor).__name__}, must be a torch.Tensor", reason="type")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise ArgumentError(name, f"layout {tensor.layout}, must be a plain strided tensor", reason="layout")
    check_positive((name, tensor))
    if tensor.dim() not in forms:
        wanted = " or ".join(f"the {n} of {form.text}" for n, form in forms.items())
        raise ArgumentError(name, f"{tensor.dim()} dimensions, must be {wanted}", reason="rank")
    if tensor.device.type != device_type:
        raise ArgumentError(name, f"is on {tensor.device}, must be on a {device_type} device", reason="device")


def _check_dtype(name: str, tensor: Tensor, tensors: Mapping[str, Any], torch: Any) -> None:
    """dtypes of the description are dtypes by name, CALL for the first tensor's, or another's name for its dtype."""
    wanted, words, first = [], [], next(iter(tensors))
    for dtype in tensor.dtypes:
        whose = first if dtype == CALL else dtype
        if whose in tensors:
            wanted.append(tensors[whose].dtype)
            words.append(f"{whose}'s, {wanted[-1]}" if len(tensor.dtypes) == 1 else str(wanted[-1]))
        else:
            wanted.append(getattr(torch, TORCH_DTYPES[dtype]))
            words.append(str(wanted[-1]))
    if tensors[name].dtype not in wanted:
        message = f"dtype {tensors[name].dtype}, must be {' or '.join(dict.fromkeys(words))}"
        raise ArgumentError(name, message, reason="dtype")


def sizes(op: str, tensors: Mapping[str, Any]) -> dict[str, int]:
    """Every dimension's size by name. ArgumentError ('shape') where two tensors disagree."""
    table = expected(op, tuple(tensors))
    found: dict[str, int] = {}
    whose: dict[str, str] = {}
    first = [name for name in FIRST if name in tensors]
    for name in (*first, *(name for name in tensors if name not in first)):
        shape = tensors[name].shape
        for (dim, times, plus), n in zip(table[name].forms[len(shape)].dims, shape, strict=True):
            size = n * times - plus
            if size < 0:
                raise ArgumentError(name, f"is empty, must have {dim} + {plus} entries", reason="shape")
            if found.setdefault(dim, size) != size:
                message = f"shape {tuple(shape)} has {dim} {size}, must be {whose[dim]}'s, {found[dim]}"
                raise ArgumentError(name, message, reason="shape")
            whose.setdefault(dim, name)
    return found


def totals(op: str, tensors: Mapping[str, Any]) -> dict[str, int]:
    """The rows of packed arrays. ArgumentError ('shape') where two disagree."""
    found: dict[str, int] = {}
    for name, wanted in expected(op, tuple(tensors)).items():
        shape = tensors[name].shape
        dim = wanted.forms[len(shape)].dims[0].name
        if dim in TOTALS and found.setdefault(dim, shape[0]) != shape[0]:
            message = f"shape {tuple(shape)} has {dim} {shape[0]}, must be {found[dim]}, as others have it"
            raise ArgumentError(name, message, reason="shape")
    return found


def _check_head_dims(tensors: Mapping[str, Any], found: Mapping[str, int]) -> None:
    step = max(STRIDE, ALIGNMENT // min(tensor.element_size() for tensor in tensors.values()))
    first = next(iter(tensors))
    for dim, name in (("head_dim", first), ("head_dim_v", "v" if "v" in tensors else first)):
        head_dim = found.get(dim, STRIDE)
        if not 0 < head_dim <= MAX_HEAD_DIM or head_dim % step:
            message = f"head_dim {head_dim}, must be a multiple of {step} from {step} to {MAX_HEAD_DIM}"
            raise ArgumentError(name, message, reason="head_dim")


def check_memory(op: str, tensors: Mapping[str, Any]) -> None:
    """Strides, storage, alignment, and that what is written does not overlap itself."""
    for name, (tensor, forms) in expected(op, tuple(tensors)).items():
        given = tensors[name]
        if tensor.access == "vectors":
            _check_vectors(name, given, forms[given.dim()])
        elif tensor.access == "elements":
            _check_elements(name, given)
        check_storage((name, given))
        alignment = ALIGNMENT if tensor.access == "vectors" else given.element_size()
        check_alignment(alignment, (name, given.data_ptr()))
        if tensor.role != "in":
            check_apart_within(name, given)


def _check_vectors(name: str, tensor: Any, form: Form) -> None:
    """What the kernels copy 16 bytes at a time; where they take no stride, it is contiguous."""
    step = ALIGNMENT // tensor.element_size()
    *shape, last_size = tensor.shape
    *stride, last = tensor.stride()
    if last_size > 1 and last != 1:
        message = f"stride {last} along head_dim, must be 1; .contiguous() it"
        raise ArgumentError(name, message, reason="contiguity")
    for axis in form.contiguous if tensor.numel() else ():
        inside = prod(tensor.shape[axis + 1 :])
        if shape[axis] > 1 and stride[axis] != inside:
            message = f"stride {stride[axis]} along dimension {axis}, must be {inside}; .contiguous() it"
            raise ArgumentError(name, message, reason="contiguity")
    for axis, (n, along) in enumerate(zip(shape, stride, strict=True)):
        if n > 1 and along % step:
            message = f"stride {along} along dimension {axis}, must be a multiple of {step} elements; .contiguous() it"
            raise ArgumentError(name, message, reason="stride")


def _check_elements(name: str, tensor: Any) -> None:
    """What the kernels read element by element."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        message = f"stride {tensor.stride(-1)} along its last dimension, must be 1; .contiguous() it"
        raise ArgumentError(name, message, reason="contiguity")
    if tensor.dim() == 2 and tensor.stride(0) > MAX_I32:
        raise ArgumentError(name, f"batch stride {tensor.stride(0)}, must be below 2**31", reason="stride")


def check_storage(*tensors: tuple[str, Any]) -> None:
    """ArgumentError for a tensor that has elements but no memory of its own."""
    for name, tensor in tensors:
        try:
            bare = tensor.data_ptr() == 0 and tensor.numel() > 0
        except RuntimeError:  # of torch.func's wrappers
            bare = True
        if bare:
            message = (
                f"{type(tensor).__name__} without memory of its own (a DTensor, FakeTensor, torch.func wrapper, freed "
                "storage), must be a plain tensor; a DTensor's is .to_local()"
            )
            raise ArgumentError(name, message, reason="storage")


def check_positive(*tensors: tuple[str, Any]) -> None:
    """ArgumentError for a view whose elements torch has yet to negate, such as the imaginary part of a conjugate."""
    for name, tensor in tensors:
        if tensor.is_neg():
            raise ArgumentError(name, "is a view still to be negated (is_neg); .resolve_neg() it", reason="layout")


def check_alignment(alignment: int, *pointers: tuple[str, int]) -> None:
    """ArgumentError for the first address that is no multiple of `alignment` bytes, a power of 2."""
    for name, address in pointers:
        if address & (alignment - 1):
            message = f"starts at {address:#x}, must start at a multiple of {alignment} bytes; .clone() it"
            raise ArgumentError(name, message, reason="alignment")


def check_address(name: str, tensor: Any, address: int, alignment: int) -> None:
    """Both of the above, for one tensor's address."""
    check_alignment(alignment, (name, address))
    if not address:
        check_storage((name, tensor))


def stride_of_batch(tensor: Any, batch: int) -> int:
    """Elements from one entry's row to the next one's; 0 where one row serves all."""
    return tensor.stride(0) if tensor is not None and tensor.dim() == 2 and batch > 1 else 0


def check_apart_within(name: str, tensor: Any) -> None:
    """That no two elements of what is written may share memory: no stride is within the extent of smaller ones."""
    reach = 0
    for step, n in sorted((step, n) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if step <= reach:
            message = "elements share memory (an expanded tensor?); give each its own"
            raise ArgumentError(name, message, reason="overlap")
        reach += step * (n - 1)


def check_tangents(forward_ad: Any, tensors: Iterable[tuple[str, Any]]) -> None:
    """ArgumentError for a tensor whose tangent of forward-mode AD would be lost."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors:
        if forward_ad.unpack_dual(tensor).tangent is not None:
            message = "has a forward-mode tangent, which is not implemented; pass its primal (fwAD.unpack_dual)"
            raise ArgumentError(name, message, reason="forward_ad")


# -- what follows -----------------------------------------------------------------------------------------------------


def strides(op: str, tensors: Mapping[str, Any], found: Mapping[str, int]) -> Numbers:
    """Every stride that a kernel of the call takes, by the parameter's name. found: its sizes.

    0 where there is but one entry, since torch leaves that open, along a packed array's batch, and of what is absent;
    new outputs are contiguous.
    """
    given = tuple(tensors)
    steps = absent(op, given).zeros | strides_of_new(op, given, found)
    for name, wanted in expected(op, given).items():
        shape, along = tensors[name].shape, tensors[name].stride()
        for parameter, place in wanted.forms[len(shape)].steps:
            steps[parameter] = along[place] if place >= 0 and shape[place] > 1 else 0
    return steps


def strides_of_new(op: str, given: tuple[str, ...], found: Mapping[str, int]) -> Numbers:
    """The same of outputs that the call makes."""
    steps: Numbers = {}
    for dims, of_output in absent(op, given).new:
        if dims <= found.keys():  # another op's output has dimensions of its own
            for parameter, (dim, *inside) in of_output:
                steps[parameter] = prod([found[inner] for inner in inside]) if found.get(dim, 1) > 1 else 0
    return steps


def alignment_masks(op: str, tensors: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """(name, bits of the address that must be 0) of each tensor: what every call asks again."""
    known = described(op)
    return tuple(
        (name, (ALIGNMENT if known[name].access == "vectors" else tensor.element_size()) - 1)
        for name, tensor in tensors.items()
    )


def family(op: str, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    """The part of a plan family's key that tensors make: names, sizes that are no lengths, dtypes, devices, and which
    strides are 0.

    Other strides are left out, since they may follow from a length. Zeros are kept, since K and V that are expanded
    from one head run as one.
    """
    found = []
    for name, wanted in expected(op, tuple(tensors)).items():
        tensor = tensors[name]
        dims = wanted.forms[tensor.dim()].dims
        shape = tuple([0 if dim.name in LENGTHS else n for dim, n in zip(dims, tensor.shape, strict=True)])
        expanded = tuple([step == 0 for step in tensor.stride()])
        found.append((name, shape, expanded, tensor.dtype, tensor.get_device()))
    return tuple(found)


def check_flag(name: str, given: Any) -> None:
    """Of an argument that is True or False, or equals one of them."""
    if given is True or given is False:
        return
    found = flag(given)
    if not isinstance(found, int) or found not in (0, 1):
        raise ArgumentError(name, f"{given!r:.100} is neither True nor False", reason="type")

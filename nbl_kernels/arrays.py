"""NumPy, CuPy and other DLPack arrays as arguments: borrowed as tensors, without a copy.

A function with tensors in its signature takes them all by one decorator, :func:`takes_arrays`.

What a function returns is what it was given: NumPy arrays in, NumPy arrays out; CuPy in, CuPy out;
torch tensors for tensors and for any other library's arrays. The arrays of one call are of one
kind. bfloat16 arrays are those of ``ml_dtypes`` (NumPy, and CuPy from 14 on).

With CuPy arrays the work is enqueued on CuPy's current stream, as that of CuPy's own functions: no
synchronization, and arrays may be released as soon as the call returns. Read-only NumPy arrays are
accepted where an argument is only read; only negative strides, which a tensor cannot have, are
copied.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def takes_arrays(*mutated: str) -> Callable[[Function], Function]:
    """A decorator: whatever the signature annotates as a Tensor may be an array.

    Arrays are borrowed, the function is called with tensors, and a tensor that it returns becomes
    an array of the caller's kind. Where all tensors that must be given are tensors, the call goes
    straight through: that is what a decode step pays for, a fraction of a microsecond.

    `mutated`: arguments that are written to. Messages begin with the function's name, but for
    methods, whose arguments stand alone.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        parameters = signature.parameters
        prefix = "" if "self" in parameters else f"{function.__name__}: "
        names = [name for name, p in parameters.items() if "Tensor" in str(p.annotation)]
        required = [name for name in names if parameters[name].default is inspect.Parameter.empty]
        places = [(list(parameters).index(name), name) for name in required]

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for place, name in places:
                given = args[place] if place < len(args) else kwargs.get(name)
                if not isinstance(given, Tensor):
                    break
            else:
                return function(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            must = {name: arguments[name] for name in required}
            may = {name: arguments[name] for name in names if name in arguments.keys() - must}
            written = tuple(name for name in mutated if arguments.get(name) is not None)
            with borrowed(prefix, must, may, written) as (tensors, give_back):
                result = function(**(arguments | tensors))
                return give_back(result) if isinstance(result, Tensor) else result

        return wrapper  # type: ignore[return-value]

    return decorate


@contextmanager
def borrowed(
    prefix: str,
    required: dict[str, object],
    optional: dict[str, object] | None = None,
    mutated: tuple[str, ...] = (),
) -> Iterator[tuple[dict[str, Tensor | None], Callable[[Tensor], Any]]]:
    """Arrays of one kind as tensors, by their names, and the way back for the results.

    Inside the context torch's current stream is CuPy's, where the arrays are CuPy's. Optional ones
    may be None. Raises TypeError, which names the argument after ``prefix``: no array, or one of
    another kind; ValueError: one of ``mutated`` that cannot be written to.
    """
    optional = optional or {}
    given = required | {name: value for name, value in optional.items() if value is not None}
    kinds = {name: _kind(value, prefix + name) for name, value in given.items()}
    model = next((name for name, kind in kinds.items() if kind == "torch"), next(iter(kinds), ""))
    kind = kinds.get(model)
    for name, other in kinds.items():
        if other != kind:
            raise TypeError(
                f"{prefix}{name} must be a {_described(kind)}, got {type(given[name]).__name__}: "
                f"the arrays of a call must be of one kind, that of {model}"
            )

    for name in mutated:
        if kind == "numpy" and not _is_writable(given[name]):
            raise ValueError(f"{prefix}{name} is written to: it must not be read-only or reversed")

    bfloat16 = next((v.dtype for v in given.values() if _is_bfloat16(v)), None)

    def give_back(result: Tensor) -> Any:
        return _from_tensor(result, kind, bfloat16)

    with _on_stream_of(kind):
        tensors = {name: as_tensor(value, prefix + name) for name, value in given.items()}
        yield dict.fromkeys(optional) | tensors, give_back


def as_tensor(value: object, name: str) -> Tensor:
    """A tensor on the memory of an array; tensors pass through. TypeError names the argument."""
    if isinstance(value, Tensor):
        return value
    kind = _kind(value, name)
    if kind == "numpy":
        value = _exportable(value)
    try:
        if _is_bfloat16(value):  # DLPack producers do not know it: its bits travel as uint16
            return torch.from_dlpack(value.view("uint16")).view(torch.bfloat16)
        return torch.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name}: this {_described(kind)} cannot be shared: {error}") from error


def _kind(value: object, name: str) -> str:
    if isinstance(value, Tensor):
        return "torch"
    if not hasattr(value, "__dlpack__"):
        raise TypeError(
            f"{name} must be a tensor or an array that supports DLPack, got {type(value).__name__}"
        )
    return type(value).__module__.partition(".")[0]


def _described(kind: str | None) -> str:
    names = {"torch": "tensor", "numpy": "NumPy array", "cupy": "CuPy array"}
    return names.get(kind, f"{kind} array")


def _is_bfloat16(value: Any) -> bool:
    return getattr(value.dtype, "name", None) == "bfloat16"


class _Memory:
    """The memory of a read-only array as NumPy's array protocol describes one that is not: DLPack
    has no way (or, later, no agreed one) to say read-only."""

    def __init__(self, array: Any) -> None:
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
        self.array = array  # keeps the memory


def _is_writable(array: Any) -> bool:
    return array.flags.writeable and all(stride >= 0 for stride in array.strides)


def _exportable(array: Any) -> Any:
    import numpy as np

    if any(stride < 0 for stride in array.strides):
        return np.ascontiguousarray(array)
    if array.flags.writeable:
        return array
    if _is_bfloat16(array):  # the array protocol does not know it
        return np.asarray(_Memory(array.view(np.uint16))).view(array.dtype)
    return np.asarray(_Memory(array))


def _on_stream_of(kind: str | None) -> Any:
    if kind != "cupy":
        return nullcontext()
    import cupy

    pointer = cupy.cuda.get_current_stream().ptr
    device = torch.device("cuda", cupy.cuda.Device().id)
    if pointer in (0, 1):  # the legacy default stream, which is torch's default too
        return torch.cuda.stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(torch.cuda.ExternalStream(pointer, device))


def _from_tensor(tensor: Tensor, kind: str | None, bfloat16: Any) -> Any:
    if kind not in ("numpy", "cupy"):
        return tensor
    if tensor.dtype == torch.bfloat16:
        return _from_tensor(tensor.view(torch.uint16), kind, None).view(bfloat16)
    if kind == "numpy":
        return tensor.numpy()
    import cupy

    return cupy.from_dlpack(tensor)

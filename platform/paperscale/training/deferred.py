"""Construction of a model without its memory: for each large tensor the way to its content, in place of the content.

A model too large for one process is constructed with its large tensors on the meta device while the operations on them
are recorded; afterwards the content of each can be had alone, at any time, on any rank::

    with deferred() as init:
        model = build()
    weight = init.value(model.fc.weight)  # on the CPU, bit-identical to what build() alone would have made

What is random is really drawn once, into memory that is freed at once, and the generator's state before it is kept:
the generator moves as it would have, so that whatever draws later gets the same numbers too. To have a tensor's content
is to run again the operations that it depends on, in their order.

- Tensors of up to 64 KiB are not deferred: code that looks at them need not wait, and they weigh next to nothing.
- Each rank holds the largest tensor, once, while it is constructed or asked for, and the records.
- What cannot be recorded is run for real and its result is kept: an operation whose result is a number, or one that
  torch does not know on the meta device. Code that reaches around torch, into a tensor's memory, raises
  :class:`NotDeferrable`; :func:`construct` then builds ordinarily.
- Afterwards, large registered parameters and buffers are on the meta device; all other tensors are real. Nothing is
  recorded any more: :meth:`Initialisation.value` refuses a tensor that was changed since.
- Two tensors that are one (tied weights) stay one. That two share memory in part is not carried over to their contents.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from paperscale.errors import UserError

_SMALL = 64 * 1024  # bytes: tensors up to this size are real
_RECORD = 1024  # bytes that an operation's record takes, roughly

# What these draw depends on shapes alone, so that it can be drawn into memory without content.
_FILLS = {"normal_", "uniform_", "random_", "exponential_", "cauchy_", "log_normal_", "geometric_"}
_DRAWS = _FILLS | {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"}
_DRAW_OVERLOADS = {torch.ops.aten.normal.float_float, torch.ops.aten.bernoulli_.float}
_OVERWRITES = _FILLS | {"zero_", "fill_", "copy_"}

_T = TypeVar("_T")
_Draw = tuple[torch.Generator, Tensor]


class NotDeferrable(RuntimeError):
    """A constructor reaches into a tensor's memory, past torch's operations."""


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _leaves(kind: type[_T], tree: Any) -> list[_T]:
    """Return what is of a kind in the arguments or the result of an operation, in their order."""
    if isinstance(tree, kind):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [leaf for branch in tree for leaf in _leaves(kind, branch)]


def _map(kind: type[_T], function: Callable[[_T], Any], tree: Any) -> Any:
    """Return arguments or the result of an operation with what is of a kind replaced."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, dict):
        return {name: _map(kind, function, branch) for name, branch in tree.items()}
    if isinstance(tree, (tuple, list)):
        branches = [_map(kind, function, branch) for branch in tree]
        return tuple(branches) if isinstance(tree, tuple) else branches
    return tree


def _tensors(tree: Any) -> list[Tensor]:
    return _leaves(Tensor, tree)


@dataclass(frozen=True)
class _View:
    """Where a tensor lies: in which storage, and how."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conjugate: bool = False
    negative: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> _View:
        geometry = (tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()))
        return cls(_key(tensor), tensor.dtype, *geometry, tensor.is_conj(), tensor.is_neg())

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        tensor = torch.empty(0, dtype=self.dtype)
        tensor.set_(storage, self.offset, self.size, self.stride)
        tensor = tensor.conj() if self.conjugate else tensor
        return tensor._neg_view() if self.negative else tensor

    def fits(self, tensor: Tensor) -> bool:
        """Return whether a tensor lies in its storage as this says."""
        layout = (tensor.dtype, tuple(tensor.size()), tensor.stride(), tensor.storage_offset())
        return layout == (self.dtype, self.size, self.stride, self.offset)


class _Live(dict[int, torch.UntypedStorage]):
    """Real storages while operations are run again; one that is asked for first has no content yet."""

    def __init__(self, storages: dict[int, _Storage]):
        super().__init__()
        self.storages = storages

    def __missing__(self, key: int) -> torch.UntypedStorage:
        self[key] = torch.UntypedStorage(self.storages[key].meta.nbytes())
        return self[key]

    def tensor(self, view: _View) -> Tensor:
        return view.on(self[view.storage])


@dataclass(frozen=True, eq=False)
class _Operation:
    """What was done.

    Attributes:
        number: its place in the order of all.
        call: function, arguments and keywords, with a :class:`_View` for each deferred tensor.
        created: for each tensor of the result, where it lies if its storage was new.
        touched: the storages that it reads or writes.
        fresh: those whose earlier content does not matter.
        draw: the generator and its state before, where it is random.
    """

    number: int
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
    created: tuple[_View | None, ...]
    touched: frozenset[int]
    fresh: frozenset[int]
    draw: _Draw | None = None

    def run(self, live: _Live) -> None:
        """Do it again on real storages."""
        func, args, kwargs = self.call
        args, kwargs = _map(_View, live.tensor, (args, kwargs))
        with _generator_at(self.draw):
            result = func(*args, **kwargs)
        inputs = {storage._cdata for storage in live.values()}
        for view, tensor in zip(self.created, _tensors(result), strict=True):
            if view is None:
                continue
            if view.fits(tensor) and _key(tensor) not in inputs:
                live[view.storage] = tensor.untyped_storage()
            else:  # laid out, or shared, otherwise than on the meta device, on which later operations rely
                live.tensor(view).copy_(tensor)


@contextmanager
def _generator_at(draw: _Draw | None) -> Iterator[None]:
    """Have a generator in an earlier state for a while."""
    if draw is None:
        yield
        return
    generator, state = draw
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)


@contextmanager
def _plainly() -> Iterator[None]:
    """Compute without whatever else is in force: recording, default devices, autocast, autograd."""
    function, autocast = torch._C.DisableTorchFunction(), torch.autocast("cpu", enabled=False)
    with function, _disable_current_modes(), autocast, torch.no_grad():
        yield


@dataclass(eq=False)
class _Storage:
    """A deferred storage.

    Attributes:
        meta: the storage without content, kept so that its address remains its own.
        writers: the operations that made its content, in their order.
        since: of these, how many came after the last that left nothing of what was there before.
        is_read: whether operations on other storages have read it, so that no writer may be forgotten.
    """

    meta: torch.UntypedStorage
    writers: list[_Operation] = field(default_factory=list)
    since: int = 0
    is_read: bool = False


class Initialisation:
    """What is known of the tensors that were deferred.

    Attributes:
        failure: why nothing was deferred after all, see :func:`construct`.
    """

    def __init__(self, failure: str = "") -> None:
        self.failure = failure
        self._storages: dict[int, _Storage] = {}
        self._count = 0
        self._finished: dict[int, tuple[Tensor, int]] = {}

    def value(self, tensor: Tensor) -> Tensor:
        """Return the content of a parameter or buffer of the model.

        Args:
            tensor: as it was when the model was constructed: ask before a strategy replaces it, or keep it.

        Returns:
            On the CPU, detached, of the same shape and dtype; the tensor's own content where it was not deferred.

        Raises:
            UserError: it is on the meta device and was not constructed here, or was changed since.
        """
        if not self.knows(tensor):
            if tensor.is_meta:
                raise UserError(
                    f"a tensor of shape {tuple(tensor.shape)} is on the meta device and its content was not recorded; "
                    "create and convert the model's tensors in its constructor, not afterwards"
                )
            return tensor.detach()
        if self._finished.get(id(tensor), (tensor, tensor._version))[1] != tensor._version:
            raise UserError(
                f"a tensor of shape {tuple(tensor.shape)} was changed after the model was constructed, before it had "
                "content; initialise it in the model's constructor"
            )
        view = _View.of(tensor)
        with _plainly():
            content = self._replay({view.storage}).tensor(view)
            owned = content.numel() * content.element_size() == content.untyped_storage().nbytes()
            return content if owned else content.clone()

    def knows(self, tensor: Tensor) -> bool:
        """Return whether a tensor is deferred."""
        return tensor.device.type == "meta" and _key(tensor) in self._storages

    def _replay(self, keys: set[int]) -> _Live:
        """Return storages with their present content; others that this takes are freed as soon as can be."""
        with _plainly():
            operations = self._needed(keys)
            last = {key: operation.number for operation in operations for key in operation.touched}
            live = _Live(self._storages)
            for operation in operations:
                operation.run(live)
                for key in operation.touched - keys:
                    if last[key] == operation.number:
                        live.pop(key, None)
            return live

    def _needed(self, keys: Iterable[int]) -> list[_Operation]:
        """Return the operations that the storages' present content depends on, in their order."""
        chosen: dict[int, _Operation] = {}
        seen: set[tuple[int, int]] = set()
        pending = [(key, self._count) for key in keys]
        while pending:
            key, time = pending.pop()
            for operation in reversed(self._storages[key].writers):
                if operation.number >= time:
                    continue
                if (key, operation.number) in seen:
                    break  # what came before it has been seen, too
                seen.add((key, operation.number))
                if operation.number not in chosen:
                    chosen[operation.number] = operation
                    pending += [(other, operation.number) for other in operation.touched - operation.fresh]
                if key in operation.fresh:
                    break
        return [chosen[number] for number in sorted(chosen)]

    def _append(self, operation: _Operation, written: Iterable[int]) -> None:
        """Add an operation to the storages it writes, and see that records do not outgrow what they describe."""
        self._count += 1
        for key in written:
            storage = self._storages[key]
            is_fresh = key in operation.fresh
            if is_fresh and not storage.is_read:
                storage.writers.clear()
            storage.writers.append(operation)
            storage.since = 0 if is_fresh else storage.since + 1
            if storage.since * _RECORD > storage.meta.nbytes():
                self._keep(key, self._replay({key})[key])

    def _keep(self, key: int, content: torch.UntypedStorage) -> None:
        """Keep a storage's content itself."""
        view = _View(key, torch.uint8, (content.nbytes(),), (1,), 0)
        call: tuple[Any, tuple[Any, ...], dict[str, Any]] = (torch.ops.aten.clone.default, (view.on(content),), {})
        self._append(_Operation(self._count, call, (view,), frozenset({key}), frozenset({key})), [key])

    # -- what is done with deferred tensors while a model is constructed ------------------------------------

    def _do(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do an operation: for real where no deferred tensor comes in or goes out, else record it."""
        inputs = _tensors((args, kwargs))
        kwargs = _on(kwargs, "cpu")
        if not any(map(self.knows, inputs)) and (inputs or not self._makes_large(func, args, kwargs)):
            return func(*args, **kwargs)
        if func.is_view:
            return func(*args, **kwargs)
        elsewhere = torch.device(kwargs.get("device") or "cpu").type != "cpu"
        is_real = [tensor for tensor in _written(func, args, kwargs) if not self.knows(tensor)]
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if is_real or elsewhere or func.namespace != "aten" or (is_random and not _draws_by_shape(func)):
            return self._compute(func, args, kwargs)
        return self._record(func, args, kwargs, is_random)

    @staticmethod
    def _makes_large(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether an operation without tensors makes a large one on the CPU."""
        if not any(argument.name == "device" for argument in func._schema.arguments):
            return False
        plain = kwargs.get("layout") in (None, torch.strided) and not kwargs.get("pin_memory")
        if not plain or torch.device(kwargs.get("device") or "cpu").type != "cpu":
            return False
        try:
            made = func(*args, **{**kwargs, "device": "meta"})
        except Exception:  # whatever is wrong, the real operation says it better
            return False
        return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(made)) > _SMALL

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_random: bool) -> Any:
        """Do an operation on the meta device, where it only finds shapes, and keep how it is done for real."""
        call = (func, *_map(Tensor, self._as_recorded, (args, kwargs)))
        written = {_key(tensor) for tensor in _written(func, args, kwargs)}
        fresh = self._overwritten(func, args, kwargs)
        meta_args, meta_kwargs = _map(Tensor, self._as_meta, (args, kwargs))
        try:
            result = func(*meta_args, **{**_on(meta_kwargs, "meta"), **dict.fromkeys({"generator"} & kwargs.keys())})
        except Exception:  # torch cannot, or not without content
            return self._compute(func, args, kwargs)
        made = _tensors(result)
        if len(made) < len(func._schema.returns):  # numbers
            return self._compute(func, args, kwargs)
        draw = self._draw(func, args, kwargs) if is_random else None
        created = tuple(None if self.knows(tensor) else _View.of(tensor) for tensor in made)
        for view, tensor in zip(created, made, strict=True):
            if view:
                self._storages.setdefault(view.storage, _Storage(tensor.untyped_storage()))
        new = {view.storage for view in created if view}
        if not written | new:
            return result  # a view of what is known
        if not _tensors((args, kwargs)) and "dtype" in {argument.name for argument in func._schema.arguments}:
            call = (func, call[1], {**call[2], "dtype": made[0].dtype})  # the default may be another one later
        touched = {view.storage for view in _leaves(_View, call[1:])} | new
        for key in touched - written:
            self._storages[key].is_read |= key not in new
        self._append(
            _Operation(self._count, call, created, frozenset(touched), frozenset(fresh | new), draw), written | new
        )
        return result

    def _as_recorded(self, tensor: Tensor) -> _View | Tensor:
        return _View.of(tensor) if self.knows(tensor) else tensor.detach().clone()

    def _as_meta(self, tensor: Tensor) -> Tensor:
        if self.knows(tensor):
            return tensor
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")

    @staticmethod
    def _overwritten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
        """Return the storage that an operation wholly overwrites, without a look at what it held."""
        if func._schema.name.removeprefix("aten::") not in _OVERWRITES:
            return set()
        target, *sources = _tensors((args, kwargs))
        whole = target.is_contiguous() and target.numel() * target.element_size() == target.untyped_storage().nbytes()
        return {_key(target)} - {_key(source) for source in sources} if whole else set()

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Draw:
        """Draw into memory that is freed at once; return the generator and its state before."""
        generators = _leaves(torch.Generator, (args, kwargs))
        generator = generators[0] if generators else torch.default_generator
        state = generator.get_state()
        args, kwargs = _map(Tensor, lambda t: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype), (args, kwargs))
        func(*args, **kwargs)
        return generator, state

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do an operation on the contents of the deferred tensors; keep the contents that it changes."""
        inputs = {id(tensor): tensor for tensor in _tensors((args, kwargs)) if self.knows(tensor)}
        live = self._replay({_key(tensor) for tensor in inputs.values()})
        real = {name: live.tensor(_View.of(tensor)) for name, tensor in inputs.items()}
        written = {_key(tensor) for tensor in _written(func, args, kwargs)} & live.keys()
        args, kwargs = _map(Tensor, lambda tensor: real.get(id(tensor), tensor), (args, kwargs))
        result = func(*args, **kwargs)
        for key in written:
            self._keep(key, live[key])
        deferred = {id(tensor): inputs[name] for name, tensor in real.items()}
        shared = {storage._cdata for storage in live.values()}
        if any(id(tensor) not in deferred and _key(tensor) in shared for tensor in _tensors(result)):
            raise NotDeferrable(f"{func} gives a view that torch does not know on the meta device")
        return _map(Tensor, lambda tensor: deferred.get(id(tensor), tensor), result)

    def _finish(self) -> None:
        """Make tensors real that are neither parameters nor buffers: they stay on the CPU, as they would have."""
        objects = gc.get_objects()
        modules = [thing for thing in objects if issubclass(type(thing), nn.Module) and "_parameters" in vars(thing)]
        registered = {
            id(t): t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
        }
        loose = [thing for thing in objects if issubclass(type(thing), Tensor) and id(thing) not in registered]
        for tensor in sorted(filter(self.knows, loose), key=lambda tensor: not tensor._is_view()):
            with contextlib.suppress(RuntimeError):  # the base of a view that is still there: torch itself holds it
                _become(tensor, self.value(tensor))
        known = filter(self.knows, registered.values())
        self._finished = {id(tensor): (tensor, tensor._version) for tensor in known}


def _on(kwargs: dict[str, Any], device: str) -> dict[str, Any]:
    """Return keywords of an operation with another device, where they name the CPU or the meta device that is it."""
    named = kwargs.get("device")
    return (
        {**kwargs, "device": torch.device(device)} if named and torch.device(named).type in ("cpu", "meta") else kwargs
    )


def _draws_by_shape(func: Any) -> bool:
    return func._schema.name.removeprefix("aten::") in _DRAWS or func in _DRAW_OVERLOADS


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation changes."""
    changed = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return _tensors(changed)


def _become(tensor: Tensor, content: Tensor) -> None:
    """Give a tensor object another content, whatever device it is on."""
    new = type(tensor)(content, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else content
    new.requires_grad_(tensor.requires_grad)
    new.__dict__.update(tensor.__dict__)
    torch.utils.swap_tensors(tensor, new)


class _Recorder(TorchDispatchMode):
    """Sees every operation."""

    def __init__(self, init: Initialisation):
        super().__init__()
        self.init = init

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self.init._do(func, args, kwargs or {})


_T_ = torch.Tensor
_ON_CPU = {_T_.device.__get__: torch.device("cpu"), _T_.is_meta.__get__: False, _T_.is_cpu.__get__: True}  # type: ignore[attr-defined]
_LOOKS = {_T_.tolist, _T_.__repr__, _T_.__format__, _T_.__reduce_ex__, _T_.numpy, _T_.__array__}
_REACHES = {_T_.data_ptr, _T_.untyped_storage, _T_.storage, _T_._typed_storage, _T_.__dlpack__, _T_.share_memory_}


class _Faces(TorchFunctionMode):
    """Lets a deferred tensor answer as the tensor on the CPU that it stands for."""

    def __init__(self, init: Initialisation):
        super().__init__()
        self.init = init

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is None:
            return func(*args, **kwargs)
        is_deferred = self.init.knows(tensor)
        if func == _T_.data.__set__:  # type: ignore[attr-defined]
            return self._set_data(tensor, is_deferred, args[1])
        if func in (_T_.to, _T_.cpu):
            return self._to(func, tensor, is_deferred, args[1:], kwargs)
        if not is_deferred:
            return func(*args, **kwargs)
        if func in _ON_CPU:
            return _ON_CPU[func]
        if func in _REACHES:
            raise NotDeferrable(f"{func.__name__} asks for the memory of a tensor that has none yet")
        if func in _LOOKS:
            looked = func(self.init.value(tensor), *args[1:], **kwargs)
            if isinstance(looked, np.ndarray):
                looked.flags.writeable = False  # what is written there would be lost
            return looked
        return func(*args, **kwargs)

    def _set_data(self, tensor: Tensor, is_deferred: bool, data: Tensor) -> None:
        if is_deferred == self.init.knows(data):
            tensor.data = data
        elif is_deferred:
            _become(tensor, data.detach())
        else:
            tensor.data = self.init.value(data)

    def _to(
        self, func: Any, tensor: Tensor, is_deferred: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Convert a tensor, which returns the tensor itself where it is already what is asked for."""
        place = "meta" if is_deferred else "cpu"
        if func == _T_.cpu:
            func, kwargs = _T_.to, {**kwargs, "device": "cpu"} if not args else kwargs
        other = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("other")
        if other is not None and other.device.type in ("cpu", "meta"):
            args, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "other"}
            return func(tensor, torch.device(place), other.dtype, *args, **kwargs)
        if args and isinstance(args[0], (str, torch.device)) and torch.device(args[0]).type in ("cpu", "meta"):
            args = (torch.device(place), *args[1:])
        return func(tensor, *args, **_on(kwargs, place))


@contextmanager
def deferred() -> Iterator[Initialisation]:
    """Construct a model in this context to have it without the content of its large tensors.

    Yields:
        Where the contents are to be had, also after the context.

    Raises:
        NotDeferrable: what is constructed reaches into a tensor's memory.
    """
    init = Initialisation()
    with _Recorder(init), _Faces(init):
        yield init
    init._finish()


def construct(build: Callable[[], _T]) -> tuple[_T, Initialisation]:
    """Build deferred where that is possible, else ordinarily.

    Args:
        build: makes the model; is called again, with the same random numbers, if it cannot be deferred.

    Returns:
        What it made, and where the contents of its tensors are to be had.
    """
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        with deferred() as init:
            return build(), init
    except UserError:
        raise
    except Exception as error:  # whatever it is: if it is the constructor's own, it is raised again below
        failure = f"{type(error).__name__}: {error}"
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    return build(), Initialisation(failure)

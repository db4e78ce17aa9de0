"""Reading a pickle as data: the few opcodes that data is made of, the few names that are expected, and no code.

Not with `pickle`: its `find_class` keeps code out, but in C it takes a memo index at its word, 4 GB for ten bytes, and
a tuple in a tuple in a tuple, hashed as the key of a dict, ends the process. `pickletools` says what the opcodes are.
"""

from __future__ import annotations

import pickletools
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from infinilm_hookspecs import CheckpointError

Names = Mapping[tuple[str, str], object]
"""What a pickle may name, as (module, name), and what stands for it: a constant, or a function that may be called."""


class Inert:
    """Stands for an object of a class that is not imported: what it was made of, and its state."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: object = None

    def field(self, name: str, *default: object) -> Any:
        """Return what the state has by this name, or `default`. Raises `DamagedPickleError` where there is neither."""
        if isinstance(self.state, dict) and name in self.state:
            return self.state[name]
        if not default:
            raise DamagedPickleError(f"a {type(self).__name__} lacks {name!r}")
        return default[0]


class DamagedPickleError(ValueError):
    """The pickle is not what was expected, or not a pickle."""


class NameRefusedError(DamagedPickleError):
    """The pickle names something that is not expected."""


def brief(value: object) -> str:
    """Return the beginning of what `value` looks like, however much of it there is."""
    return reprlib.repr(value)[:80]


def load_restricted(
    data: bytes,
    names: Names,
    *,
    where: str,
    way_out: str,
    persistent_load: Callable[[Any], object] | None = None,
) -> Any:
    """Return what `data` holds. Raises `CheckpointError` beginning with `where`.

    A pickle that names anything else than `names` is refused, with `way_out` saying what to do. `persistent_load` gets
    what the pickle refers to outside of itself.
    """
    try:
        return _Machine(names, persistent_load).run(data)
    except NameRefusedError as err:
        raise CheckpointError(
            f"{where} is refused: its pickle asks for {err}, and no tensor needs it; {way_out}"
        ) from err
    except DamagedPickleError as err:
        raise CheckpointError(f"{where} holds a damaged pickle: {err}") from err
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as err:  # what nonsense leads to
        raise CheckpointError(f"{where} holds a damaged pickle: {type(err).__name__}: {err}") from err


class _Machine:
    """The stack machine that a pickle is a program for: https://github.com/python/cpython/blob/main/Lib/pickletools.py"""

    def __init__(self, names: Names, persistent_load: Callable[[Any], object] | None) -> None:
        self._names = names
        self._persistent_load = persistent_load
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Return what is on the stack at the end."""
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise DamagedPickleError("it does not end")

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(self._pop(int(opcode[-1])))
            case "MARK":
                self._marks.append(len(stack))
            case "TUPLE":
                stack.append(self._pop_to_mark())
            case _:
                self._act(opcode, argument)

    def _act(self, opcode: str, argument: Any) -> None:
        """Take the step of an opcode that refers to a name, or changes what is on the stack already."""
        match opcode:
            case "GLOBAL":
                self._stack.append(self._find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                self._stack.append(self._find(*self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._pop(2)
                self._stack.append(_call(function, arguments))
            case "BINPERSID":
                if self._persistent_load is None:
                    raise DamagedPickleError("it refers to something outside of itself")
                self._stack.append(self._persistent_load(self._stack.pop()))
            case "APPEND":
                self._append(self._pop(1))
            case "APPENDS":
                self._append(self._pop_to_mark())
            case "SETITEM":
                self._put(self._pop(2))
            case "SETITEMS":
                self._put(self._pop_to_mark())
            case "BUILD":
                self._build(self._stack.pop())
            case _:
                raise DamagedPickleError(f"data does not need the opcode {opcode}")

    def _find(self, module: object, name: object) -> object:
        if not isinstance(module, str) or not isinstance(name, str):
            raise DamagedPickleError(f"a name is {brief(name)} of {brief(module)}")
        if (module, name) not in self._names:
            raise NameRefusedError(f"{module}.{name}")
        return self._names[module, name]

    def _pop(self, count: int) -> tuple[Any, ...]:
        if len(self._stack) - (self._marks[-1] if self._marks else 0) < count:
            raise DamagedPickleError("it takes from an empty stack")
        taken = tuple(self._stack[-count:])
        del self._stack[-count:]
        return taken

    def _pop_to_mark(self) -> tuple[Any, ...]:
        at = self._marks.pop()
        taken = tuple(self._stack[at:])
        del self._stack[at:]
        return taken

    def _append(self, items: tuple[Any, ...]) -> None:
        if not isinstance(self._stack[-1], list):
            raise DamagedPickleError(f"something is appended to a {type(self._stack[-1]).__name__}")
        self._stack[-1].extend(items)

    def _put(self, items: tuple[Any, ...]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise DamagedPickleError(f"an item is set of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | Inert):
                raise DamagedPickleError(f"a {type(key).__name__} is the key of a dict")
            target[key] = value

    def _build(self, state: object) -> None:
        target = self._stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, OrderedDict):  # whose attributes, `_metadata` of a state dict, nobody reads
            raise DamagedPickleError(f"a {type(target).__name__} is given a state")


def _call(function: Any, arguments: object) -> object:
    if not callable(function) or not isinstance(arguments, tuple):
        raise DamagedPickleError(f"{brief(function)} is called with {brief(arguments)}")
    return function(*arguments)

"""A pickle machine that cannot call anything: data in, plain containers out.

Python's own unpickler imports what a file names and calls it. This one executes the opcodes that `torch.save` writes on
a stack of plain values. A global is a look-up in a table of ours, and only entries of that table can be called, so a
file chooses among our inert constructors and nothing else. Arguments are parsed by `pickletools.genops`, which reads no
more than there is, so a length in the file allocates nothing by itself.
"""

from __future__ import annotations

import dataclasses
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from .mapped import UnreadableError

MAX_DEPTH = 100
"""Containers within containers: far more than a checkpoint has, far less than Python's recursion limit."""


class PickleError(UnreadableError):
    """A pickle that is broken, or asks for what is not data."""


class RefusedGlobalError(PickleError):
    """A pickle that names a function or class which is not in the table. name: which."""

    def __init__(self, name: str):
        super().__init__(f"it names {name}")
        self.name = name


@dataclasses.dataclass(frozen=True)
class Constructor:
    """What a file may call: `build` gets the arguments that the file gives, and has to check them."""

    build: Callable[..., Any]


class Record(dict[str, Any]):
    """What stands for an object whose attributes are data, such as an `argparse.Namespace`: them."""

    def set_state(self, state: Any) -> None:
        """Take the attributes that the file gives."""
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise PickleError("it fills a record with something else than attributes")
        self.update(state)


@dataclasses.dataclass
class NumpyType:
    """What stands for a `numpy.dtype`: its kind and size, as in "f8", and its byte order."""

    code: str
    order: str = "<"

    def set_state(self, state: Any) -> None:
        """Take the byte order; what else a dtype's state tells is of structured ones."""
        match state:
            case (int(), "<" | ">" | "|" | "=" as order, None, None, None, *_):
                self.order = {"=": "<", "|": "<"}.get(order, order)
            case _:
                raise PickleError("it describes a dtype that is not of numbers or text")

    def read(self, data: bytes) -> bool | int | float | str:
        """The one value that the bytes are. PickleError if they are not one of this type."""
        if not re.fullmatch(r"[biufU]\d{1,9}", self.code):
            raise PickleError(f"it holds a NumPy value of type {printable(self.code)}")
        dtype = np.dtype(f"{self.order}{self.code}")
        if dtype.itemsize != len(data):
            raise PickleError(f"it holds {len(data)} bytes as a NumPy value of {dtype.itemsize}")
        value: bool | int | float | str = np.frombuffer(data, dtype)[0].item()
        return value


def load(stream: IO[bytes] | Any, known: Mapping[str, Any], persistent: Callable[[Any], Any]) -> Any:
    """The value of the pickle at the stream's position, which is left behind its last byte.

    known: "module.name" -> an inert value, or a Constructor. persistent: what stands for a persistent id.
    Raises RefusedGlobalError for a name that is not known; PickleError for whatever else is not a plain pickle.
    """
    machine = _Machine(known, persistent)
    try:
        for opcode, argument, position in pickletools.genops(stream):
            machine.read = position or 0
            machine.step(opcode.name, argument)
        return machine.pop()
    except UnreadableError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise PickleError(printable(f"{type(error).__name__}: {error}")) from error


def plain(value: Any, leaf: Callable[[Any], Any], limit: int) -> Any:
    """Dicts, lists and plain values; tuples become lists, and `leaf` converts what else there is.

    limit: how many values the result may have. A pickle of n bytes can refer to its containers from each other, and
    would otherwise become 2**n of them. Raises PickleError above it, and for cycles.
    """
    left = limit

    def visit(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise PickleError(
                "its containers refer to each other until they hold more than the file"
                if left < 0
                else f"its containers lie more than {MAX_DEPTH} deep in each other"
            )
        if isinstance(value, Mapping):
            return {key: visit(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [visit(item, depth + 1) for item in value]
        return value if value is None or isinstance(value, (bool, int, float, str, bytes)) else leaf(value)

    return visit(value, 0)


def printable(text: str, length: int = 100) -> str:
    """A string out of a file, safe to print: no control characters, not long."""
    text = "".join(character if character.isprintable() else "?" for character in text[: length + 1])
    return text if len(text) <= length else text[: length - 3] + "..."


_INTEGERS = frozenset({"BININT", "BININT1", "BININT2", "LONG1"})
_TEXTS = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"})
_LITERALS = _INTEGERS | _TEXTS | {"BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_KEYS = (str, int, float, bool, bytes, type(None))


def checked_key(key: Any) -> Any:
    """A key that a dict may have. Raises PickleError for others.

    To hash and print a tuple of tuples of tuples can take for ever; integers beyond 64 bits can be chosen so that all
    of them have one hash.
    """
    if type(key) not in _KEYS or (type(key) is int and not -(2**63) <= key < 2**64):
        raise PickleError(
            f"a dict has a {type(key).__name__} {'beyond 64 bits ' if type(key) is int else ''}as its key"
        )
    return key


class _Machine:
    def __init__(self, known: Mapping[str, Any], persistent: Callable[[Any], Any]):
        self.known = known
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.read = 0  # bytes of the file, up to here
        self.copied = 0

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif handler := _HANDLERS.get(name):
            handler(self, argument)
        else:
            raise PickleError(f"its opcode {name} is not one that torch.save writes")

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise PickleError("it takes more than it has put on its stack")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def peek(self, kind: type) -> Any:
        value = self.pop()
        self.stack.append(value)
        if type(value) is not kind:
            raise PickleError(f"it fills a {type(value).__name__} as if it were a {kind.__name__}")
        return value

    def look_up(self, name: str) -> None:
        module, _, rest = name.partition(".")
        name = f"builtins.{rest}" if module == "__builtin__" else name
        if name not in self.known:
            raise RefusedGlobalError(printable(name))
        self.stack.append(self.known[name])

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.look_up(f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?")

    def tuple_of(self, count: int) -> None:
        self.stack.append(tuple([self.pop() for _ in range(count)][::-1]))

    def append(self, items: list[Any]) -> None:
        self.peek(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.peek(dict)
        if len(items) % 2:
            raise PickleError("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def pop_pair(self) -> list[Any]:
        value, key = self.pop(), self.pop()
        return [key, value]

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Constructor) or type(arguments) is not tuple:
            raise PickleError(f"it calls a {type(function).__name__}")
        made = function.build(*arguments)
        self.copied += len(arguments) + (len(made) if isinstance(made, (dict, list, tuple, str, bytes)) else 0)
        if self.copied > 4 * self.read + 1000:
            raise PickleError("its constructors copy the same values until they are more than the file has bytes")
        self.stack.append(made)

    def build(self) -> None:
        state = self.pop()
        if self.stack and isinstance(self.stack[-1], (Record, NumpyType)):
            self.stack[-1].set_state(state)
        else:
            self.peek(dict)  # an OrderedDict, whose attributes are a state dict's _metadata: versions of its modules

    def memoize(self, index: int) -> None:
        value = self.pop()
        self.stack.append(value)
        self.memo[index] = value


_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, argument: None,
    "FRAME": lambda m, argument: None,
    "STOP": lambda m, argument: None,
    "MARK": lambda m, argument: m.marks.append(len(m.stack)),
    "EMPTY_DICT": lambda m, argument: m.stack.append({}),
    "EMPTY_LIST": lambda m, argument: m.stack.append([]),
    "EMPTY_SET": lambda m, argument: m.stack.append([]),
    "ADDITEMS": lambda m, argument: m.append(m.pop_mark()),
    "TUPLE": lambda m, argument: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m, argument: m.tuple_of(1),
    "TUPLE2": lambda m, argument: m.tuple_of(2),
    "TUPLE3": lambda m, argument: m.tuple_of(3),
    "APPEND": lambda m, argument: m.append([m.pop()]),
    "APPENDS": lambda m, argument: m.append(m.pop_mark()),
    "SETITEM": lambda m, argument: m.set_items(m.pop_pair()),
    "SETITEMS": lambda m, argument: m.set_items(m.pop_mark()),
    "BINGET": lambda m, argument: m.stack.append(m.memo[argument]),
    "LONG_BINGET": lambda m, argument: m.stack.append(m.memo[argument]),
    "BINPUT": lambda m, argument: m.memoize(argument),
    "LONG_BINPUT": lambda m, argument: m.memoize(argument),
    "MEMOIZE": lambda m, argument: m.memoize(len(m.memo)),
    "GLOBAL": lambda m, argument: m.look_up(argument.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda m, argument: m.stack_global(),
    "BINPERSID": lambda m, argument: m.stack.append(m.persistent(m.pop())),
    "REDUCE": lambda m, argument: m.call(),
    "NEWOBJ": lambda m, argument: m.call(),
    "BUILD": lambda m, argument: m.build(),
}

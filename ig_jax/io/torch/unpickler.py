"""Pickles of plain data, read without importing, looking up or calling anything that they name.

A pickle is a program for a small stack machine. This is that machine, without the instructions
that import: a name in the pickle stays a `Name`, an instruction that would call it is looked up in
a table of makers, and an instruction that would set attributes reaches only a `Record`, or a
`Stateful` that a maker made. Anything else is refused. The instructions are described in Python's
own pickletools.
"""

from __future__ import annotations

import io
import mmap
import pickletools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ig_jax.errors import UserError, shown
from ig_jax.io.files import DEEPEST

MEND = "save a dict of tensors, numbers and text only, such as model.state_dict()"

VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

# About how many bytes of memory things take: each of its kind, and each element of one.
CONTAINER, SET, CALL, NOTE = 64, 224, 256, 64
REFERENCE, ENTRY = 8, 64  # an element of a list or tuple; of a dict or set
_TEXT = 24  # a character or byte that a call is given: charged so that it is copied four times
START, PER_BYTE = 2**20, 96  # what a pickle may cost: to start with, and for each of its bytes
LARGEST_KEY = 2**53  # larger numbers can be chosen to have one hash, and make dicts slow


@dataclass(frozen=True, slots=True)
class Name:
    """A dotted name from a pickle; nothing is ever looked up by it."""

    dotted: str


class Namespace(Mapping):
    """Contents of an argparse.Namespace, by name; read-only."""

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"Record({self._fields})"


class Stateful(ABC):
    """Base of what a maker returns to be given the state that the pickle has of it."""

    @abstractmethod
    def set_state(self, state: Any) -> None: ...


def run(
    program: bytes | mmap.mmap,
    makers: Mapping[str, Callable[..., Any]],
    inert: Collection[str],
    refer: Callable[[Any], Any],
) -> Any:
    """The object that a pickle describes: dicts, lists, tuples, sets, numbers, text, bytes.

    An OrderedDict becomes a dict, without its attributes; an argparse.Namespace becomes a Record.

    Args:
      program: the pickle, of protocol 2 or higher; in a mapped file it begins where the file
        stands, and the file then stands at its end.
      makers: more that may be called: by dotted name, what stands in for it.
      inert: dotted names that may occur, but not be called.
      refer: from a persistent id to what it stands for.

    Raises:
      UserError: the pickle asks for anything else, or for more memory than its size allows; the
        object is nested more than `DEEPEST` levels deep, holds itself, or holds one thing so often
        that walking it takes out of proportion to the pickle.
      ValueError, TypeError, LookupError: it is no valid pickle.
    """
    machine = _Machine({**PLAIN_MAKERS, **makers}, inert, refer)
    file = io.BytesIO(program) if isinstance(program, bytes) else program
    start = file.tell()
    for name, argument in _instructions(file):
        machine.allow(START + PER_BYTE * (file.tell() - start))
        machine.step(name, argument)
    (result,) = machine.stack
    for _ in leaves(result, START + PER_BYTE * (file.tell() - start)):
        pass
    return result


def _instructions(file: io.BytesIO | mmap.mmap) -> Iterator[tuple[str, Any]]:
    """Names and arguments, to the end of the pickle."""
    name = ""
    while name != "STOP":
        # Not by pickletools.genops, which also parses arguments of instructions that are refused.
        code = file.read(1).decode("latin1")
        if code not in OPCODES:
            raise ValueError(f"no pickle instruction {code!r}")
        name, argument = OPCODES[code].name, OPCODES[code].arg
        if name not in KNOWN:
            raise UserError(f"holds the pickle instruction {name}; {MEND}")
        if argument is pickletools.stringnl_noescape_pair:
            yield name, _dotted(file)
        else:
            yield name, None if argument is None else argument.reader(file)


def _dotted(file: io.BytesIO | mmap.mmap) -> str:
    """Two lines, as pickle itself reads them; pickletools would look for escapes in them."""
    lines = [file.readline(), file.readline()]
    if not all(line.endswith(b"\n") for line in lines):
        raise ValueError("it ends within a name")
    return ".".join(line[:-1].decode() for line in lines)


def leaves(value: Any, most: int) -> Iterator[Any]:
    """Yields what a value's dicts, lists, tuples, sets and Records hold, as often as it is held.

    Raises:
      UserError: it is nested too deep, or copying it as it is walked would cost more than `most`.
    """
    left = [(value, 1)]
    while left:
        found, depth = left.pop()
        if depth > DEEPEST:
            raise UserError(f"is nested more than {DEEPEST} levels deep, or holds itself; {MEND}")
        most -= _cost(found)
        if most < 0:
            raise UserError(f"holds the same things over and over; {MEND}")
        if isinstance(found, Mapping):
            left.extend((inner, depth + 1) for inner in (*found, *found.values()))
        elif isinstance(found, list | tuple | set):
            left.extend((inner, depth + 1) for inner in found)
        else:
            yield found


def _cost(value: Any) -> int:
    """Of a copy that holds the same elements."""
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    if isinstance(value, Mapping):
        return CONTAINER + ENTRY * len(value)
    if isinstance(value, set):
        return SET + ENTRY * len(value)
    if isinstance(value, list | tuple):
        return CONTAINER + REFERENCE * len(value)
    return REFERENCE


def _cost_to_call(arguments: tuple) -> int:
    """A maker may copy its arguments, as it does a list to a set and a text to bytes."""
    texts = sum(len(a) for a in arguments if isinstance(a, str | bytes | bytearray))
    others = sum(len(a) for a in arguments if isinstance(a, list))
    return CALL + _cost(arguments) + _TEXT * texts + ENTRY * others


def refused(dotted: str) -> UserError:
    return UserError(f"holds {dotted[:100]!r}, which is more than plain weights; {MEND}")


def _only(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _key(value: Any) -> Any:
    # A deeply nested tuple would overflow the stack of Python itself when hashed.
    if not isinstance(value, str | bytes | int | float | None):
        raise UserError(f"has a {type(value).__name__} as a dictionary key or in a set; {MEND}")
    if isinstance(value, int) and abs(value) > LARGEST_KEY:
        raise UserError(f"has {shown(value)} as a dictionary key or in a set; {MEND}")
    return value


def _set(items: Any) -> set:
    return {_key(item) for item in _only(list, items)}


PLAIN_MAKERS = {
    "collections.OrderedDict": lambda: {},
    "argparse.Namespace": Namespace,
    "builtins.set": _set,
    "__builtin__.set": _set,
}


class _Machine:
    """The stack, the marks on it, and the memo of a pickle under way."""

    def __init__(self, makers: Mapping, inert: Collection[str], refer: Callable) -> None:
        self._makers, self._inert, self._refer = makers, inert, refer
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._allowed = self._charged = 0

    def allow(self, cost: int) -> None:
        """Sets how much all steps so far and the next may cost."""
        self._allowed = cost

    def _charge(self, cost: int) -> None:
        self._charged += cost
        if self._charged > self._allowed:
            raise UserError(f"asks for memory out of proportion to its size; {MEND}")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
            self._charge(_cost(stack[-1]))
        elif name in TUPLES:
            self._push_tuple(self._pop(TUPLES[name]))
        else:
            INSTRUCTIONS[name](self, argument)

    def _push_tuple(self, items: list) -> None:
        self._charge(_cost(items))
        self.stack.append(tuple(items))

    def _pop(self, count: int) -> list:
        if count > len(self.stack):
            raise IndexError("the pickle takes more values than it gave")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def _pop_to_mark(self) -> list:
        return self._pop(max(0, len(self.stack) - self._marks.pop()))

    def _mark(self, _) -> None:
        self._marks.append(len(self.stack))

    def _nothing(self, _) -> None:
        pass

    def _memoize(self, _) -> None:
        self._put(len(self._memo))

    def _put(self, place: int) -> None:
        self._charge(NOTE)
        self._memo[place] = self.stack[-1]

    def _get(self, place: int) -> None:
        self.stack.append(self._memo[place])

    def _tuple(self, _) -> None:
        self._push_tuple(self._pop_to_mark())

    def _append(self, _) -> None:
        self._extend(self._pop(1))

    def _appends(self, _) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, items: list) -> None:
        self._charge(REFERENCE * len(items))
        _only(list, self.stack[-1]).extend(items)

    def _set_item(self, _) -> None:
        self._update(self._pop(2))

    def _set_items(self, _) -> None:
        self._update(self._pop_to_mark())

    def _update(self, items: list) -> None:
        self._charge(ENTRY * len(items))
        keys = [_key(key) for key in items[::2]]
        _only(dict, self.stack[-1]).update(zip(keys, items[1::2], strict=True))

    def _add_items(self, _) -> None:
        items = self._pop_to_mark()
        self._charge(ENTRY * len(items))
        _only(set, self.stack[-1]).update(_key(item) for item in items)

    def _global(self, dotted: str) -> None:
        self._push_name(dotted)

    def _instance(self, dotted: str) -> None:
        raise refused(dotted)

    def _stack_global(self, _) -> None:
        module, name = self._pop(2)
        self._charge(len(_only(str, module)) + len(_only(str, name)))
        self._push_name(f"{module}.{name}")

    def _push_name(self, dotted: str) -> None:
        if dotted not in self._makers and dotted not in self._inert:
            raise refused(dotted)
        self._charge(CALL)
        self.stack.append(Name(dotted))

    def _make(self, _) -> None:
        name, arguments = self._pop(2)
        dotted = _only(Name, name).dotted
        if dotted not in self._makers:
            raise refused(dotted)
        self._charge(_cost_to_call(_only(tuple, arguments)))
        self.stack.append(self._makers[dotted](*arguments))

    def _build(self, _) -> None:
        (state,) = self._pop(1)
        self._charge(_cost(state))
        if isinstance(self.stack[-1], Stateful):
            self.stack[-1].set_state(state)
            return
        for name in _only(dict, state):
            if not isinstance(name, str) or name.startswith("__"):
                raise UserError(f"sets the attribute {shown(name)}; {MEND}")
        target = self.stack[-1]
        if type(target) is Namespace:
            target._fields.update(state)
        else:
            _only(dict, target)  # an OrderedDict: its attributes are not data

    def _persistent(self, _) -> None:
        self._charge(CALL)
        self.stack.append(self._refer(*self._pop(1)))


INSTRUCTIONS = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _Machine._nothing),
    "MARK": _Machine._mark,
    "MEMOIZE": _Machine._memoize,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine._put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine._get),
    "TUPLE": _Machine._tuple,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "ADDITEMS": _Machine._add_items,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "INST": _Machine._instance,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine._make),
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent,
}
OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
KNOWN = {*VALUES, *CONSTANTS, *_EMPTY, *TUPLES, *INSTRUCTIONS}

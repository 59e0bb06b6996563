"""Reads plain values and number arrays from untrusted pickles without unpickling.

A pickle is a program, and unpickling runs it: it may import and call anything. This module only reads pickles.
`pickletools.genops` splits the bytes into instructions and executes none. `read_pickle` carries out the instructions
that build plain data, on a stack of its own. The instruction that loads a global loads only its name. The instruction
that calls compares that name with the seven names that arrays, scalars and bytes need, and `read_pickle` does their
work itself on checked arguments. The instruction that sets an object's state fills an array or the byte order of a
dtype, and nothing else. So no text in the file ever becomes an object of the interpreter.

An Unpickler whose find_class has a list of allowed names is shorter but less safe. The file can call the allowed
objects with any arguments (`numpy.ndarray` of any size) and set their attributes. Extension codes that were looked up
before bypass the list. The memo of `pickle.Unpickler` is as long as its highest position: seven bytes, `]`, a PUT at
2**28 - 1 and `.`, took 4.1 GB of memory (Python 3.11). Here the length of the file limits copies of bytes, and a high
memo position takes no memory.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np

_DTYPES = {f"{kind}{size}" for kind, sizes in {"i": "1248", "u": "1248", "f": "48"}.items() for size in sizes}
_PLAIN = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


def read_pickle(data: bytes) -> Any:
    """The plain value in a pickle of protocol 0 to 5: None, bool, int, float, str, bytes, list, tuple, dict.

    NumPy's integer and floating scalars become int and float, and arrays of them stay arrays. Strings of Python 2 are
    read as Latin-1. Sets, other classes, persistent ids, extension codes and out-of-band buffers are refused.

    Args:
        data: The bytes of the pickle.

    Raises:
        ValueError: If the file is damaged or holds something that is refused. The message names it.
    """
    try:
        return _Reader(len(data)).run(data)
    except (IndexError, KeyError) as error:
        raise ValueError(f"the pickle is damaged: it uses a value that it did not store ({error})") from None


@dataclass(frozen=True)
class _Global:
    """The name of a class or function in a pickle. Nothing is imported or called by it."""

    module: str
    name: str


@dataclass
class _Dtype:
    code: str
    order: str = "="


class _Reader:
    def __init__(self, budget: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.budget = budget

    def run(self, data: bytes) -> Any:
        try:
            for opcode, argument, position in pickletools.genops(data):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.step(opcode.name, argument, position or 0)
        except OverflowError as error:
            raise ValueError(f"the pickle is damaged: {error}") from None
        raise ValueError("the pickle is damaged: it has no end")

    def step(self, name: str, argument: Any, position: int) -> None:
        stack = self.stack
        match name:
            case _ if name in _PLAIN:
                stack.append(argument)
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_DICT":
                stack.append({})
            case "LIST":
                stack.append(self.pop_mark())
            case "TUPLE":
                stack.append(tuple(self.pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "DICT":
                items = self.pop_mark()
                stack.append({})
                self.set_items(items)
            case "APPEND":
                self.extend([stack.pop()])
            case "APPENDS":
                self.extend(self.pop_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_mark())
            case "GLOBAL":
                stack.append(_Global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                own, module = stack.pop(), stack.pop()
                if not isinstance(module, str) or not isinstance(own, str):
                    raise ValueError("the pickle is damaged: the name of a global is not text")
                stack.append(_Global(module, own))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.call(function, arguments))
            case "BUILD":
                state = stack.pop()
                self.build(stack[-1], state)
            case _:
                raise ValueError(f"the pickle holds {name} at byte {position}: only plain data is read")

    def pop_mark(self) -> list[Any]:
        """Pops the items above the last mark, and the mark."""
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("the pickle is damaged: it appends to something that is not a list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError(
                "the pickle is damaged: it sets an item of something that is not a dict, or an incomplete item"
            )
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) or not key:
                raise ValueError(f"the pickle has a dict whose key is not text but a {type(key).__name__}")
            target[key] = value

    def call(self, function: object, arguments: object) -> Any:
        """The result of a known constructor, made here. Raises ValueError for other names."""
        if not isinstance(function, _Global):
            raise ValueError(f"the pickle calls a {type(function).__name__}: only plain data is read")
        named = (function.module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins"), function.name)
        match named, arguments:
            case ("numpy", "dtype"), (str(code), _, _) if code in _DTYPES:
                return _Dtype(code)
            case ("numpy", "dtype"), (str(code), _, _):
                raise ValueError(f"the pickle holds a NumPy array of dtype {code[:20]!r}: only numbers are read")
            case ("numpy.core.multiarray", "_reconstruct"), (_Global("numpy", "ndarray"), _, _):
                return np.empty(0)  # `build` fills it
            case ("numpy.core.multiarray", "scalar"), (_Dtype() as dtype, raw):
                return self.numbers(dtype, (), raw, "C").item()
            case ("numpy.core.numeric", "_frombuffer"), (raw, _Dtype() as dtype, shape, "C" | "F" as order):
                return self.numbers(dtype, shape, raw, order)
            case ("_codecs", "encode"), (str(text), "latin1" | "latin-1"):  # how protocols 0 to 2 write bytes
                self.spend(len(text))
                return text.encode("latin-1")
            case ("builtins", "bytes"), ():
                return b""
        raise ValueError(
            f"the pickle wants to call {function.module[:80]}.{function.name[:80]}, which is refused. Only lists, "
            "numbers "
            "and names are read; do not load this file in another way"
        )

    def build(self, target: object, state: object) -> None:
        match target, state:
            case _Dtype(), (_, "<" | ">" | "|" | "=" as order, None, None, None, *_):
                target.order = order
            case np.ndarray(), (_, shape, _Dtype() as dtype, bool(fortran), raw):
                values = self.numbers(dtype, shape, raw, "F" if fortran else "C")
                raw = values.tobytes("A")
                target.__setstate__((1, values.shape, values.dtype, fortran, raw))  # type: ignore[arg-type]
            case _:
                raise ValueError(f"the pickle sets the state of a {type(target).__name__}: only plain data is read")

    def numbers(self, dtype: _Dtype, shape: object, raw: object, order: Any) -> np.ndarray:
        """An array from its raw bytes."""
        if isinstance(raw, str):  # Python 2
            raw = raw.encode("latin-1")
        kind = np.dtype(dtype.code).newbyteorder(dtype.order)  # type: ignore[arg-type]
        if not isinstance(raw, bytes | bytearray) or len(raw) % kind.itemsize:
            raise ValueError("the pickle holds a NumPy array that is damaged: its bytes are not those of numbers")
        if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError("the pickle holds a NumPy array that is damaged: its shape is not valid")
        self.spend(len(raw))
        return np.frombuffer(raw, kind).reshape(shape, order=order)

    def spend(self, count: int) -> None:
        self.budget -= count
        if self.budget < 0:
            raise ValueError("the pickle expands to more than its own length, which is refused")

"""PyTorch's files, written by hand: zips of a pickle and its storages, and hostile pickles."""

import argparse
import collections
import io
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from dataclasses import dataclass
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from ig_jax.errors import UserError
from ig_jax.io.torch import file as torch_file

STORAGE_OF = {
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}


def rebuilder(name):
    function = types.FunctionType((lambda *_: None).__code__, {}, name)
    function.__module__, function.__qualname__ = "torch._utils", name
    return function


TENSOR, PARAMETER = rebuilder("_rebuild_tensor_v2"), rebuilder("_rebuild_parameter")
STORAGE_TYPES = {name: type(name, (), {"__module__": "torch"}) for name in STORAGE_OF.values()}


class Size(tuple):
    def __reduce__(self):
        return Size, (tuple(self),)


Size.__module__ = "torch"


def stand_in_for_torch():
    """The modules under which pickle must find what it writes the name of."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    vars(torch).update(STORAGE_TYPES, Size=Size, _utils=utils)
    vars(utils).update({TENSOR.__name__: TENSOR, PARAMETER.__name__: PARAMETER})
    return mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils})


@dataclass(frozen=True, eq=False)
class Storage:
    elements: np.ndarray
    claimed: int | None = None  # number of elements to write in place of the true one


@dataclass(frozen=True, eq=False)
class Tensor:
    storage: Storage
    offset: int
    size: tuple
    stride: tuple
    rest: tuple = ()


@dataclass(frozen=True, eq=False)
class Parameter:
    data: Tensor


def tensor(array):
    array = np.asarray(array)
    stride = tuple(step // array.itemsize for step in array.strides)
    return Tensor(Storage(array.reshape(-1)), 0, array.shape, stride)


class Pickler(pickle.Pickler):
    def __init__(self, file, protocol):
        super().__init__(file, protocol)
        self.storages = []

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        if obj not in self.storages:
            self.storages.append(obj)
        kind = STORAGE_TYPES[STORAGE_OF[obj.elements.dtype]]
        numel = obj.elements.size if obj.claimed is None else obj.claimed
        return "storage", kind, str(self.storages.index(obj)), "cpu", numel

    def reducer_override(self, obj):
        hooks = collections.OrderedDict()
        if isinstance(obj, Tensor):
            where = (obj.storage, obj.offset, obj.size, obj.stride)
            return TENSOR, (*where, False, hooks, *obj.rest)
        if isinstance(obj, Parameter):
            return PARAMETER, (obj.data, True, hooks)
        return NotImplemented


def pickled(obj, protocol=2):
    """The pickle, and the bytes of each storage under its key."""
    file = io.BytesIO()
    with stand_in_for_torch():
        pickler = Pickler(file, protocol)
        pickler.dump(obj)
    elements = (storage.elements for storage in pickler.storages)
    return file.getvalue(), {str(k): array.tobytes() for k, array in enumerate(elements)}


def write_zip(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(f"archive/{name}")
            info.compress_type = method
            # As torch.save: padding in the header, so that data starts further on.
            info.extra = b"FB\x05\x00ZZZZZ"
            archive.writestr(info, content)
    return path


def write(path, obj, *, protocol=2, byteorder=b"little", **options):
    program, storages = pickled(obj, protocol)
    data = {f"data/{key}": content for key, content in storages.items()}
    return write_zip(
        path, {"data.pkl": program, "byteorder": byteorder, **data, "version": b"3\n"}, **options
    )


def write_program(path, program):
    return write_zip(path, {"data.pkl": program, "data/0": bytes(16)})


def refusal(path):
    with pytest.raises(UserError) as caught:
        torch_file.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def training_file():
    model = collections.OrderedDict(w=tensor(np.full((2, 3), 1.0, np.float32)))
    ema = collections.OrderedDict(w=tensor(np.full((2, 3), 2.0, np.float32)))
    for weights in (model, ema):
        weights._metadata = collections.OrderedDict({"": {"version": 1}})
    moments = {"step": tensor(np.float32(7)), "exp_avg": tensor(np.zeros((2, 3), np.float32))}
    groups = [{"lr": 1e-4, "betas": (0.9, 0.999), "foreach": None, "params": [0, 1]}]
    return {
        "model": model,
        "ema": ema,
        "opt": {"state": {0: moments, 1: {}}, "param_groups": groups},
        "args": argparse.Namespace(model="SiT-B/2", cfg_prob=0.1, fused=True, seeds={3}),
        "epoch": 4,
        "steps": 2**40,
        "shape": Size((2, 3)),
        "raw": b"\x00\xff",
    }


def text(value):
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


class Reduced:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def touch_by_python(sentinel):
    return f"__import__('pathlib').Path({str(sentinel)!r}).touch()"


ATTACKS = {
    "global": lambda s: ("os.system", b"\x80\x02cos\nsystem\n" + text(f"touch {s}") + b"\x85R."),
    "stack_global": lambda s: (
        "os.system",
        b"\x80\x04" + text("os") + text("system") + b"\x93" + text(f"touch {s}") + b"\x85R.",
    ),
    "inst": lambda s: ("os.system", b"(" + text(f"touch {s}") + b"ios\nsystem\n."),
    "obj": lambda s: ("os.system", b"(cos\nsystem\n" + text(f"touch {s}") + b"o."),
    "eval": lambda s: (
        "builtins.eval",
        b"\x80\x03cbuiltins\neval\n" + text(touch_by_python(s)) + b"\x85R.",
    ),
    "python_2_eval": lambda s: (
        "__builtin__.eval",
        b"\x80\x02c__builtin__\neval\n" + text(touch_by_python(s)) + b"\x85R.",
    ),
    "reduce": lambda s: (
        "subprocess.call",
        pickle.dumps({"model": Reduced(subprocess.call, (["touch", str(s)],))}, 4),
    ),
    "in_a_state_dict": lambda s: (
        "builtins.exec",
        pickle.dumps(collections.OrderedDict(w=Reduced(exec, (touch_by_python(s),))), 4),
    ),
}

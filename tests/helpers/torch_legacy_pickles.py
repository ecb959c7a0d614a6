"""PyTorch's files from before version 1.6, written by hand: pickles one after the other."""

import io
import pickle
import struct
import sys
from dataclasses import dataclass

from torch_pickles import (
    Pickler,
    Storage,
    rebuilder,
    stand_in_for_torch,
)

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {
    "protocol_version": VERSION,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 8},
}
OLD_TENSOR = rebuilder("_rebuild_tensor")


@dataclass(frozen=True, eq=False)
class Part:
    """A storage that is a part of another one."""

    whole: Storage
    offset: int
    numel: int


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """A call of PyTorch's with these arguments."""

    function: object
    arguments: tuple


class LegacyPickler(Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, Part):
            return (*super().persistent_id(obj.whole), ("a key", obj.offset, obj.numel))
        reference = super().persistent_id(obj)
        return reference and (*reference, None)

    def reducer_override(self, obj):
        if isinstance(obj, Rebuilt):
            return obj.function, obj.arguments
        return super().reducer_override(obj)


def pickled(obj, protocol=2):
    """The pickle, and the elements of each storage under its key."""
    file = io.BytesIO()
    with stand_in_for_torch():
        sys.modules["torch._utils"]._rebuild_tensor = OLD_TENSOR
        pickler = LegacyPickler(file, protocol)
        pickler.dump(obj)
    return file.getvalue(), {str(k): s.elements for k, s in enumerate(pickler.storages)}


def stored(elements, count=None):
    return struct.pack("<q", elements.size if count is None else count) + elements.tobytes()


def write(path, obj, protocol=2, *, count=None, **other):
    """`other` are pickles to write in place of the true ones, or storages."""
    program, storages = pickled(obj, protocol)
    # Not in the order of the object, which the format does not promise.
    storages = dict(reversed(storages.items()))
    plain = {"magic": MAGIC, "version": VERSION, "system": SYSTEM}
    parts = {name: pickle.dumps(value, protocol) for name, value in plain.items()}
    parts["object"] = program
    parts["keys"] = pickle.dumps(list(storages), protocol)
    parts["storages"] = b"".join(stored(elements, count) for elements in storages.values())
    path.write_bytes(b"".join({**parts, **other}.values()))
    return path

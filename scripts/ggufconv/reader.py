"""Reads a GGUF file (versions 2 and 3, little endian).

Nothing in the file is trusted: every count, length and offset is compared with the
file's size before it is used, so a damaged file costs no memory and no traceback.
"""

import mmap
import os
import struct

from .dequant import BLOCKS, TYPE_NAMES
from .errors import ConversionError

_MAGIC = b"GGUF"
_MAX_STRING = 1 << 24
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
# Value type -> struct code.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL = 7


class Tensor:
    """A tensor's entry. `shape` is row-major: [rows, columns], the reverse of the file's order."""

    __slots__ = ("name", "shape", "type", "offset", "num_bytes")

    def __init__(self, name, shape, type_id, offset, num_bytes):
        self.name = name
        self.shape = shape
        self.type = type_id
        self.offset = offset  # from the start of the file
        self.num_bytes = num_bytes


class GgufFile:
    """An open GGUF file: `metadata` (name -> value), `tensors` (name -> Tensor), read(tensor)."""

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < 24:
                    raise self.error(f"it has {self.size} bytes and is no GGUF file")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as e:
            raise ConversionError(f"cannot read {path}: {e.strerror}") from e
        self._at = 0
        self.metadata = {}
        self.tensors = {}
        self._read_header()

    def close(self):
        self._map.close()

    def error(self, what):
        return ConversionError(f"{self.path}: {what}")

    def read(self, tensor, first_row, num_rows):
        """The bytes of rows [first_row, first_row + num_rows) of a tensor; a vector is one row."""
        row_bytes = tensor.num_bytes // (tensor.shape[0] if len(tensor.shape) > 1 else 1)
        begin = tensor.offset + first_row * row_bytes
        return self._map[begin : begin + num_rows * row_bytes]

    def _take(self, num_bytes, what):
        begin = self._at
        if num_bytes > self.size - begin:
            raise self.error(f"it ends inside {what} (byte {begin} of {self.size}): truncated or damaged")
        self._at = begin + num_bytes
        return begin

    def _scalar(self, code, what):
        begin = self._take(struct.calcsize(code), what)
        return struct.unpack_from("<" + code, self._map, begin)[0]

    def _string(self, what):
        length = self._scalar("Q", what)
        if length > _MAX_STRING:
            raise self.error(f"{what} claims {length} bytes: damaged")
        begin = self._take(length, what)
        try:
            return self._map[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.error(f"{what} is not UTF-8") from e

    def _value(self, value_type, what):
        if value_type == _STRING:
            return self._string(what)
        if value_type == _ARRAY:
            return self._array(what)
        if value_type not in _SCALARS:
            raise self.error(f"{what} has the unknown value type {value_type}")
        value = self._scalar(_SCALARS[value_type], what)
        return bool(value) if value_type == _BOOL else value

    def _array(self, what):
        element, count = self._scalar("I", what), self._scalar("Q", what)
        if element == _STRING:
            size = 8
        elif element in _SCALARS:
            size = struct.calcsize(_SCALARS[element])
        else:
            raise self.error(f"{what} is an array of the unknown value type {element}")
        if count > (self.size - self._at) // size:
            raise self.error(f"{what} claims {count} elements, more than the file holds: truncated or damaged")
        if element == _STRING:
            return [self._string(what) for _ in range(count)]
        begin = self._take(count * size, what)
        values = list(struct.unpack_from(f"<{count}{_SCALARS[element]}", self._map, begin))
        return [bool(v) for v in values] if element == _BOOL else values

    def _read_header(self):
        if self._map[:4] != _MAGIC:
            raise self.error("it does not begin with 'GGUF' and is no GGUF file")
        self._at = 4
        version = self._scalar("I", "the header")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in (2, 3):
                raise self.error("it is a big-endian GGUF file; only little-endian ones are read")
            raise self.error(f"GGUF version {version} is not read, only 2 and 3")
        num_tensors = self._scalar("Q", "the header")
        num_values = self._scalar("Q", "the header")
        # The smallest entries: a tensor's 8 + 4 + 8 + 4 + 8 bytes, a value's 8 + 4 + 1.
        if num_tensors > self.size // 32 or num_values > self.size // 13:
            raise self.error(f"its header claims {num_tensors} tensors and {num_values} values: damaged")
        for i in range(num_values):
            name = self._string(f"the name of metadata value {i}")
            if name in self.metadata:
                raise self.error(f"the metadata value '{name}' occurs twice")
            value_type = self._scalar("I", f"the metadata value '{name}'")
            self.metadata[name] = self._value(value_type, f"the metadata value '{name}'")
        entries = [self._tensor_entry(i) for i in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self.error(f"general.alignment = {alignment} is no power of two up to 65536")
        data = -(-self._at // alignment) * alignment
        for tensor in entries:
            if tensor.offset % alignment:
                raise self.error(f"tensor '{tensor.name}' begins at {tensor.offset}, no multiple of {alignment}")
            tensor.offset += data
            if tensor.offset + tensor.num_bytes > self.size:
                raise self.error(
                    f"tensor '{tensor.name}' ends at byte {tensor.offset + tensor.num_bytes}, "
                    f"the file at {self.size}: truncated or damaged"
                )
            if tensor.name in self.tensors:
                raise self.error(f"tensor '{tensor.name}' occurs twice")
            self.tensors[tensor.name] = tensor

    def _tensor_entry(self, index):
        name = self._string(f"the name of tensor {index}")
        what = f"the entry of tensor '{name}'"
        num_dims = self._scalar("I", what)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self.error(f"tensor '{name}' has {num_dims} dimensions")
        dims = [self._scalar("Q", what) for _ in range(num_dims)]
        type_id = self._scalar("I", what)
        offset = self._scalar("Q", what)
        if type_id not in BLOCKS:
            type_name = TYPE_NAMES.get(type_id, f"number {type_id}")
            read = ", ".join(TYPE_NAMES[t] for t in BLOCKS)
            raise self.error(f"tensor '{name}' is of type {type_name}, which is not read (only {read})")
        block, block_bytes = BLOCKS[type_id]
        count = 1
        for dim in dims:
            count *= dim
        if count == 0 or count > self.size * 8:
            raise self.error(f"tensor '{name}' has the shape {dims}: damaged")
        if dims[0] % block:
            raise self.error(f"tensor '{name}' has rows of {dims[0]}, no multiple of {block} as {TYPE_NAMES[type_id]} needs")
        return Tensor(name, dims[::-1], type_id, offset, count // block * block_bytes)

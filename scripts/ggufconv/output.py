"""A model directory that appears whole or not at all, and the safetensors file in it."""

import json
import os
import shutil
import tempfile

from .dequant import to_bfloat16
from .errors import ConversionError

_CHUNK_VALUES = 1 << 22
_HEADER_ALIGNMENT = 8


class NewDirectory:
    """A context whose `path` becomes `target` when the block ends, and vanishes if it raises."""

    def __init__(self, target, num_bytes, force):
        self.target = os.path.abspath(target)
        self.parent, name = os.path.split(self.target)
        if not force and os.path.lexists(self.target):
            raise ConversionError(f"{target} exists already (--force replaces it)")
        try:
            os.makedirs(self.parent, exist_ok=True)
            free = shutil.disk_usage(self.parent).free
            if free < num_bytes:
                raise ConversionError(
                    f"no space: {self.parent} has {free >> 20} MiB free, the model needs {num_bytes >> 20} MiB"
                )
            self.path = tempfile.mkdtemp(prefix=f".{name}.partial-", dir=self.parent)
            os.chmod(self.path, 0o755)
        except OSError as e:
            raise ConversionError(f"cannot write {target}: {e.strerror}") from e

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self._publish()
        except OSError as e:
            raise ConversionError(f"cannot write {self.target}: {e.strerror}") from e
        finally:
            shutil.rmtree(self.path, ignore_errors=True)
        if kind is not None and issubclass(kind, OSError):
            raise ConversionError(f"cannot write {self.target}: {error.strerror}") from error

    def _publish(self):
        _sync(self.path)
        if os.path.isdir(self.target) and not os.path.islink(self.target):
            old = tempfile.mkdtemp(prefix=os.path.basename(self.path) + ".old-", dir=self.parent)
            try:
                os.rename(self.target, os.path.join(old, "old"))
                os.rename(self.path, self.target)
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(self.path, self.target)
        _sync(self.parent)

    def write_text(self, name, text):
        with open(os.path.join(self.path, name), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def write_json(self, name, value, indent=2):
        self.write_text(name, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def _sync(directory):
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def num_values(tensor):
    count = 1
    for dim in tensor.source.shape:
        count *= dim
    return count


def write_safetensors(path, model, progress):
    """All tensors of `model` as BF16; progress(bytes_done, bytes_total) is called on the way."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in model.tensors:
        begin, end = end, end + 2 * num_values(tensor)
        header[tensor.name] = {
            "dtype": "BF16",
            "shape": tensor.source.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    done = 0
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in model.tensors:
            for values in model.chunks(tensor, _CHUNK_VALUES):
                data = to_bfloat16(values).astype("<u2", copy=False)
                file.write(data)
                done += data.nbytes
                progress(done, end)
        file.flush()
        os.fsync(file.fileno())

"""Owns the check of a packed model's files against its table of layers, from safetensors headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qtipcli.errors import CorruptError, QtipError, storage_error
from qtipcli.nn.layout import PackedLayout, StoredTensor
from qtipcli.untrusted import open_regular

Header = dict[str, tuple[str, tuple[int, ...], str]]
"""Tensor name -> (dtype as safetensors names it, shape, file)."""

REMEDY = "copy the model again, or quantize again"


def check_tensors(layouts: Mapping[str, PackedLayout], files: Sequence[str | Path]) -> None:
    """Raise unless `files` hold every tensor of every layer in `layouts`, in its shape and dtype, and no other packed layer.

    No weight is read. Raises CorruptError naming the tensor or file, and QtipError where a file is no safetensors file.
    """
    header = _read_headers(files)
    expected = {f"{name}.{suffix}": stored for name, layout in layouts.items() for suffix, stored in layout.tensors().items()}
    missing = [key for key in expected if key not in header]
    strays = [key for key in header if key.endswith(".trellis") and key not in expected]
    # transformers may have saved layers under other names than it loads them into; then all of them are both.
    renamed = bool(strays) and len(strays) == sum(key.endswith(".trellis") for key in missing)
    if missing and not renamed:
        layer, _, suffix = missing[0].rpartition(".")
        raise CorruptError(
            f"the weights of layer {layer} are incomplete: tensor {suffix} is in none of {len(files)} file(s)", REMEDY
        )
    if strays and not renamed:
        raise CorruptError(f"tensor {strays[0]} in {header[strays[0]][2]} belongs to no layer in config.json", REMEDY)
    for key, stored in expected.items():
        if key in header:
            _check_one(key, stored, *header[key])


def _check_one(key: str, stored: StoredTensor, dtype: str, shape: tuple[int, ...], file: str) -> None:
    if shape != stored.shape or dtype not in stored.dtypes:
        stated = f"{' or '.join(stored.dtypes)} {list(stored.shape)}"
        raise CorruptError(
            f"tensor {key} in {file} is {dtype} {list(shape)}, but by config.json it is {stated}",
            f"weights and config.json are not of the same model: {REMEDY}",
        )


def _read_headers(files: Sequence[str | Path]) -> Header:
    header: Header = {}
    for file in files:
        path = Path(file)
        if path.suffix != ".safetensors":
            raise QtipError(f"{path} is no safetensors file", "qtip models are never pickled: do not load this file")
        try:
            open_regular(path, REMEDY).close()
            with safe_open(path, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118, a safe_open is no mapping
                    if key in header:
                        raise CorruptError(f"tensor {key} is in {header[key][2]} and in {path.name}", REMEDY)
                    tensor = opened.get_slice(key)
                    header[key] = (tensor.get_dtype(), tuple(tensor.get_shape()), path.name)
        except OSError as error:
            raise storage_error(error, path, "read") from error
        except SafetensorError as error:
            raise CorruptError(f"{path} is damaged: {error}", REMEDY) from error
    return header

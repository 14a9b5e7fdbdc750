"""Owns a Hub model that is not fetched: its small files in a directory that goes again, its weights by their headers alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

from qtipcli.errors import CorruptError, QtipError
from qtipcli.model.hub_errors import hub_errors
from qtipcli.model.source import (
    CONFIG_FILE,
    DTYPES,
    OTHER_COPIES,
    ModelSource,
    StoredTensor,
    small_files,
)


@contextmanager
def described(
    name: str, revision: str | None = None, trust_remote_code: bool = False, accepted_method: str | None = None
) -> Iterator[ModelSource]:
    """A local directory, or a Hub model by the headers of its weights; while inside, its small files are there.

    Nothing is added to the Hub's cache. accepted_method: as of ModelSource.open, which raises the same errors.
    """
    if Path(name).expanduser().exists() or name.startswith((".", "/", "~")):
        yield ModelSource.open(name, revision, trust_remote_code, accepted_method)
        return
    with tempfile.TemporaryDirectory(prefix="qtip-dry-run-") as directory:
        yield _of_hub(name, revision, trust_remote_code, accepted_method, Path(directory))


def _of_hub(
    name: str, revision: str | None, trust_remote_code: bool, accepted_method: str | None, directory: Path
) -> ModelSource:
    with hub_errors(name, revision):
        snapshot_download(
            name,
            revision=revision,
            allow_patterns=small_files(trust_remote_code),
            ignore_patterns=list(OTHER_COPIES),
            local_dir=directory,
        )
        if not (directory / CONFIG_FILE).is_file():
            raise QtipError(f"{name} on the Hugging Face Hub has no {CONFIG_FILE}", "choose a transformers model")
        try:
            metadata = get_safetensors_metadata(name, revision=revision)
        except NotASafetensorsRepoError as error:
            raise QtipError(f"{name} has no safetensors weights", "choose a model that has them") from error
        except SafetensorsParsingError as error:
            raise CorruptError(f"{name} has a damaged safetensors file", "choose another revision") from error
    tensors: dict[str, StoredTensor] = {}
    for file, content in metadata.files_metadata.items():
        for tensor, info in content.tensors.items():
            if info.dtype not in DTYPES:
                hint = "start from the original model with its bf16 or fp16 weights"
                raise QtipError(f"{name}: {tensor} is stored as {info.dtype}: the model is quantized already", hint)
            tensors[tensor] = StoredTensor(directory / file, tuple(info.shape), DTYPES[info.dtype])
    return ModelSource.of_directory(directory, name, trust_remote_code, accepted_method, tensors)

"""Owns the head and the token embedding of a model: which modules they are, whether they are one, and if they can be packed."""

from __future__ import annotations

from torch import nn

from qtipcli.errors import QtipError
from qtipcli.model.skeleton import Skeleton


def find_head(skeleton: Skeleton) -> tuple[str, nn.Linear]:
    """(name, module) of the linear that makes logits of the final hidden states.

    Raises QtipError where the model has no head, or one that is no plain torch.nn.Linear.
    """
    name, head = _named(skeleton, skeleton.model.get_output_embeddings(), "head")
    # Exactly: a subclass may compute something else.
    if type(head) is not nn.Linear:
        raise QtipError(
            f"the head of {skeleton.source.name}, {name}, is {type(head).__name__}, not a torch.nn.Linear",
            "leave it as it is: leave --head-bits out, and for a tied one --embedding-bits",
        )
    return name, head


def find_embedding(skeleton: Skeleton) -> tuple[str, nn.Embedding]:
    """(name, module) of the token embedding.

    Raises QtipError where it is no plain torch.nn.Embedding: Gemma's, for one, multiplies what it looks up.
    """
    name, embedding = _named(skeleton, skeleton.model.get_input_embeddings(), "embedding")
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        kind = type(embedding).__name__ if type(embedding) is not nn.Embedding else "an Embedding with max_norm"
        raise QtipError(
            f"the token embedding of {skeleton.source.name}, {name}, is {kind}, which computes more than a look-up",
            "leave it as it is: leave --embedding-bits out",
        )
    return name, embedding


def is_tied(skeleton: Skeleton) -> bool:
    """Whether the token embedding is also another module's matrix, which can be the head's only.

    Raises QtipError where it is that of anything else.
    """
    matrix = f"{_named(skeleton, skeleton.model.get_input_embeddings(), 'embedding')[0]}.weight"
    sharers = [name for name, original in skeleton.tied.items() if original == matrix]
    if not sharers and matrix not in skeleton.tied:
        return False
    head = f"{find_head(skeleton)[0]}.weight"
    if sharers != [head]:
        others = ", ".join(sorted({*sharers, skeleton.tied.get(matrix, head)} - {head})) or head
        raise QtipError(
            f"{matrix} of {skeleton.source.name} is also {others}",
            "leave --head-bits and --embedding-bits out: it stays as it is",
        )
    return True


def _named(skeleton: Skeleton, module: nn.Module | None, role: str) -> tuple[str, nn.Module]:
    for name, candidate in skeleton.model.named_modules():
        if candidate is module:
            return name, candidate
    raise QtipError(f"{type(skeleton.model).__name__} does not say which module is its {role}", f"leave --{role}-bits out")

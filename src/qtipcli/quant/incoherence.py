"""Owns the incoherence transform of weights and Hessians: random signs, padding to whole tiles, orthonormal Hadamard.

W~ = H_out S_out W S_in H_in^T, and the Hessian turns with the input side (QTIP and QuIP#, the random Hadamard transform).
Dimension key: O outputs, I inputs; P and J the same padded to multiples of 16.
"""

import hashlib

import numpy as np
import torch
from torch.nn.functional import pad

from qtipcli.quant.hessian import panels
from qtipcli.quant.transform import Transform, padded
from qtipcli_kernels.dispatch import hadamard


def random_signs(length: int, seed: int, name: str) -> torch.Tensor:
    """float32 [length] of -1 and 1, a function of seed and name alone: the order in which layers are done does not matter."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    draws = np.random.Generator(np.random.PCG64([seed, key])).integers(0, 2, length)
    return torch.from_numpy(draws * 2.0 - 1.0).to(torch.float32)


def rotate_inputs(matrix_XI: torch.Tensor, signs_I: torch.Tensor, transform: Transform) -> torch.Tensor:
    """Rows of `matrix_XI` as the packed layer sees its inputs: sign, zero padding, Hadamard; [X, J]."""
    columns = padded(matrix_XI.shape[1])
    signed = pad(matrix_XI * signs_I.to(matrix_XI.dtype), (0, columns - matrix_XI.shape[1]))
    return hadamard(signed, transform.block_of(columns))


def rotate_weight(
    weight_OI: torch.Tensor,
    signs_O: torch.Tensor,
    signs_I: torch.Tensor,
    transform: Transform,
    transform_out: Transform | None = None,
) -> torch.Tensor:
    """W~ = H_out S_out W S_in H_in^T, [P, J]. transform_out: of the output side, None where it is the input side's."""
    inputs_turned = rotate_inputs(weight_OI, signs_I, transform)
    return rotate_inputs(inputs_turned.T, signs_O, transform_out or transform).T.contiguous()


def rotate_hessian(hessian_II: torch.Tensor, signs_I: torch.Tensor, transform: Transform) -> torch.Tensor:
    """H_in S_in H S_in H_in^T, [J, J]; padded inputs have zero rows and columns before the turn."""
    return rotate_hessian_(hessian_II.clone(), signs_I, transform).contiguous()


def rotate_hessian_(hessian_II: torch.Tensor, signs_I: torch.Tensor, transform: Transform) -> torch.Tensor:
    """The same in place, but for inputs that are padded; column-major.

    Rows are turned panel by panel, and then columns: what is read as a column is one row of the transpose.
    """
    inputs = len(hessian_II)
    size = padded(inputs)
    square_JJ = hessian_II
    if size != inputs:
        square_JJ = hessian_II.new_zeros(size, size)
        square_JJ[:inputs, :inputs] = hessian_II
    for part in panels(inputs):
        square_JJ[part] = rotate_inputs(square_JJ[part, :inputs], signs_I, transform)
    for part in panels(size):
        square_JJ[:, part] = rotate_inputs(square_JJ[:inputs, part].T, signs_I, transform).T
    return square_JJ.T


def rotate_weight_back(
    rotated_PJ: torch.Tensor,
    signs_O: torch.Tensor,
    signs_I: torch.Tensor,
    transform: Transform,
    transform_out: Transform | None = None,
) -> torch.Tensor:
    """The inverse of `rotate_weight` with padding cut off: S_out H_out^T W~ H_in S_in, [O, I]."""
    rows, columns = rotated_PJ.shape
    inputs_back = hadamard(rotated_PJ, transform.block_of(columns), transpose=True)[:, : len(signs_I)] * signs_I
    block_out = (transform_out or transform).block_of(rows)
    outputs_back = hadamard(inputs_back.T.contiguous(), block_out, transpose=True)[:, : len(signs_O)] * signs_O
    return outputs_back.T.contiguous()

"""Owns the search for the place behind a linear where its output still counts one to one.

That is its own output, or what it has been added to, such as the hidden states behind an output projection. Nothing of an
architecture is known: noise is added to the output, and a place qualifies that moves by exactly the noise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from qtipcli.model.inputs import BlockInput, run_block
from qtipcli.model.linears import expert_place, find_linears
from qtipcli.model.skeleton import Skeleton

PROBE_TOKENS = 16

PROBE_ERROR = 1e-3
"""Largest difference, relative to the noise, of how a place moves from the noise: sums in float32 err by less."""

OUTPUT = ""
"""The place that is the block's output."""

Place = str | None
"""The input of the module of that name; OUTPUT; None where nothing is added to the linear's own output."""


class _Enough(Exception):  # noqa: N818 - it says that a point was reached, not that something is wrong
    """Ends a block's run where all that is asked for has been seen."""


def find_places(skeleton: Skeleton, index: int, probe: BlockInput) -> dict[str, Place]:
    """Linear of block `index`, which is materialized -> the last place behind it.

    Linears that are not called once for every token, such as an expert's, are absent.
    probe: a small batch; only how the block computes matters, not what its hidden states are.
    """
    block = skeleton.blocks[index][1]
    linears = find_linears(block)
    tokens = probe.hidden[..., 0].numel()
    plain = _Trace(skeleton, index, probe)
    found: dict[str, Place] = {}
    for name, linear in linears.items():
        outputs = plain.outputs.get(name, [])
        if expert_place(block, name) is not None or len(outputs) != 1 or outputs[0].numel() != tokens * linear.out_features:
            continue
        noise = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0)).to(outputs[0])
        noise = noise * outputs[0].std().clamp(min=1e-6)
        noisy = _Trace(skeleton, index, probe, name, noise)
        place = next((place for place in reversed(plain.order) if _moves(plain, noisy, place, noise)), None)
        is_own = place is None or torch.equal(plain.at[place].flatten(0, -2), outputs[0].flatten(0, -2))
        found[name] = None if is_own else place
    return found


def _moves(plain: _Trace, noisy: _Trace, place: str, noise: Tensor) -> bool:
    """Whether what is at `place` moved by exactly the noise."""
    before, after = plain.at.get(place), noisy.at.get(place)
    if before is None or after is None or before.shape != noise.shape or after.shape != noise.shape:
        return False
    return bool((after - before - noise).norm() <= PROBE_ERROR * noise.norm())


class _Trace:
    """What stood at each place in one run of a block, with noise added to the output of one linear.

    at: place -> the tensor, for modules that are called once with one. order: places in the order in which they were reached.
    outputs: linear -> what it returned, call by call.
    """

    def __init__(
        self, skeleton: Skeleton, index: int, probe: BlockInput, noisy: str | None = None, noise: Tensor | None = None
    ) -> None:
        block = skeleton.blocks[index][1]
        self.at: dict[str, Tensor] = {}
        self.order: list[str] = []
        self.outputs: dict[str, list[Tensor]] = {}
        with contextlib.ExitStack() as stack:
            for name, module in block.named_modules():
                if name:
                    stack.enter_context(_hook(module.register_forward_pre_hook(_keep_input(self, name), with_kwargs=True)))
            for name, linear in find_linears(block).items():
                stack.enter_context(
                    _hook(linear.register_forward_hook(self._keep_output(name, noise if name == noisy else None)))
                )
            output = run_block(skeleton, index, probe).to(skeleton.device)
        self.at = {name: tensor for name, tensor in self.at.items() if self.order.count(name) == 1}
        self.at[OUTPUT] = output
        self.order.append(OUTPUT)

    def _keep_output(self, name: str, noise: Tensor | None) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, args: object, output: Tensor) -> Tensor | None:
            self.outputs.setdefault(name, []).append(output)
            return None if noise is None else output + noise

        return hook


def _keep_input(trace: _Trace, name: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        first = _first_tensor(args, kwargs)
        trace.order.append(name)
        if first is not None:
            trace.at[name] = first.clone()  # a module may write to what it is given

    return hook


@contextlib.contextmanager
def _hook(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def look(
    skeleton: Skeleton, index: int, one_input: BlockInput, linears: Sequence[str], places: Collection[str], once: bool = True
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """One run of block `index`, ended as soon as all is seen.

    once: each linear is called once, so that nothing more is to be waited for after that.
    Returns (linear -> [N, I] of each of its calls, for each of `linears`; place -> [N, O], for each of `places`).
    """
    block = skeleton.blocks[index][1]
    inputs: dict[str, list[Tensor]] = {name: [] for name in linears}
    behind: dict[str, Tensor] = {}

    def see_input(name: str, tensor: Tensor) -> None:
        inputs[name].append(_rows(tensor).clone())  # a module may write to what it is given
        end_if_seen()

    def see_place(name: str, tensor: Tensor) -> None:
        behind[name] = _rows(tensor).clone()
        end_if_seen()

    def end_if_seen() -> None:
        if once and all(inputs.values()) and len(behind) == len(places):
            raise _Enough

    def before(see: Callable[[str, Tensor], None], name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: see(name, _first_tensor(args, kwargs))

    with contextlib.ExitStack() as stack:
        for see, names in ((see_input, linears), (see_place, [place for place in places if place != OUTPUT])):
            for name in names:
                reached = block.get_submodule(name)
                stack.enter_context(_hook(reached.register_forward_pre_hook(before(see, name), with_kwargs=True)))
        with contextlib.suppress(_Enough):
            output = run_block(skeleton, index, one_input)
            if OUTPUT in places:
                behind[OUTPUT] = _rows(output.to(skeleton.device))
    return inputs, behind


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _first_tensor(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def signature(block: nn.Module) -> Sequence[object]:
    """Equal for blocks that compute alike: classes and names of all their modules."""
    return tuple((name, type(module)) for name, module in block.named_modules())

"""The fused GPU product against the definition in float64: no worse than twice torch's own product of the same dtype."""

import pytest
import torch
from random_packed import RAGGED, SPECS, name, packed, table, x_rows

from qtipcli_kernels.decode import reference
from qtipcli_kernels.device import DeviceError
from qtipcli_kernels.matvec import gpu, loop
from qtipcli_kernels.spec import SpecError, TrellisSpec

SPEC = TrellisSpec("1mad", 2)


def errors(x, trellis, spec, lut):
    """(error of the kernel, error of torch's product of the decoded matrix in x's dtype), both against float64."""
    weight = reference.decode(trellis.cpu(), spec, None if lut is None else lut.cpu())
    exact = x.double().cpu() @ weight.double().T
    plain = x.cpu() @ weight.T.to(x.dtype)
    return float((gpu.matvec(x, trellis, spec, lut).cpu() - exact).norm()), float((plain - exact).norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_every_code_within_twice_torchs_error(spec, dtype, device):
    lut = table(spec)
    trellis = packed(spec, *RAGGED).to(device)
    x = x_rows(3, RAGGED[1]).to(device, dtype)
    found, plain = errors(x, trellis, spec, None if lut is None else lut.to(device))
    assert found <= 2 * plain


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 9, 16])
def test_every_number_of_rows(batch, device):
    trellis = packed(SPEC, 32, 80).to(device)
    found, plain = errors(x_rows(batch, 80).to(device), trellis, SPEC, None)
    assert found <= 2 * plain


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48), (144, 416)])
def test_every_number_of_tiles(shape, device):
    trellis = packed(SPEC, *shape).to(device)
    found, plain = errors(x_rows(2, shape[1]).to(device, torch.float16), trellis, SPEC, None)
    assert found <= 2 * plain


def test_chunks_cover_the_inputs_once(device, monkeypatch):
    """Several chunks with a short last one; each partial product is that of its own inputs."""
    monkeypatch.setattr(gpu, "MIN_CHUNK", 4)
    inputs = 40 * 16
    trellis = packed(SPEC, 16, inputs).to(device)
    x = x_rows(2, inputs).to(device)
    parts = gpu.partial_products(x, trellis, SPEC)
    weight = reference.decode(trellis.cpu(), SPEC)
    assert len(parts) == 2
    for part, chosen in zip(parts.cpu(), (slice(0, 512), slice(512, 640)), strict=True):
        torch.testing.assert_close(part, x.cpu()[:, chosen] @ weight[:, chosen].T, rtol=1e-5, atol=1e-4)


def test_rows_do_not_see_each_other(device):
    trellis = packed(SPEC, 32, 64).to(device)
    x = x_rows(5, 64).to(device, torch.float16)
    alone = gpu.matvec(x[2:3], trellis, SPEC)
    x[0], x[4] = torch.nan, torch.inf
    together = gpu.matvec(x, trellis, SPEC)
    assert torch.equal(together[2:3], alone)
    assert together[0].isnan().all()


def test_the_same_operands_give_the_same_bits(device):
    trellis = packed(SPEC, *RAGGED).to(device)
    x = x_rows(4, RAGGED[1]).to(device, torch.float16)
    assert torch.equal(gpu.matvec(x, trellis, SPEC), gpu.matvec(x, trellis, SPEC))


def test_programs_take_whole_trips_and_fill_a_gpu():
    for tile_rows, tile_columns in ((1, 1), (8, 36), (256, 256), (896, 256), (512, 1792), (1792, 512), (4, 1000)):
        chunk = gpu.chunk_of(tile_rows, tile_columns)
        assert chunk % gpu.UNROLL == 0
        warps = -(-tile_columns // chunk) * -(-tile_rows // loop.WARP_ROWS)
        most = tile_rows * tile_columns / loop.WARP_ROWS / gpu.MIN_CHUNK
        assert warps >= min(gpu.WARPS_WANTED, most) / 2
        programs = -(-tile_columns // (chunk * loop.WARP_PARTS))
        # Nor does the last program leave the others to work alone for long.
        assert tile_columns < 64 or programs * chunk * loop.WARP_PARTS <= 1.25 * tile_columns


def test_which_kernel_serves_what():
    half, single = torch.zeros(1, 16, dtype=torch.float16), torch.zeros(1, 16)
    if torch.cuda.is_available() and torch.version.hip is None:
        half, single = half.cuda(), single.cuda()
        assert gpu.kernel(SPEC, half) == "ptx"
    else:
        assert gpu.kernel(SPEC, half) == "triton"
    assert gpu.kernel(SPEC, single) == "triton"
    assert gpu.kernel(TrellisSpec("lut", 2), half) == "triton"
    assert gpu.kernel(TrellisSpec("hyb", 2), half, torch.zeros(512, 2)) == "triton"  # a float32 table


@pytest.mark.parametrize("code", ["1mad", "hyb"])
def test_the_nvidia_kernel_is_given_what_it_was_compiled_for(code, monkeypatch):
    """What a launch hands over has the types of the compile case, which the emulator's tests take for granted."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *operands, **options: launched.append((operands, options))

    monkeypatch.setattr(gpu.device, "check", lambda **_: None)
    monkeypatch.setattr(gpu, "kernel", lambda *_: "ptx")
    monkeypatch.setattr(gpu, "_has_wide_table", lambda _: False)
    monkeypatch.setattr(gpu, "_nvidia_kernel", Kernel())
    spec = TrellisSpec(code, 2) if code == "1mad" else TrellisSpec(code, 4)
    # 48 inputs: three tiles, whose x takes the room of four.
    gpu.partial_products(torch.zeros(3, 48, dtype=torch.float16), packed(spec, 32, 48), spec, table(spec))
    (operands, options), case = launched[0], next(case for case in gpu.compile_cases() if f"ptx {code} 2," in case.name)
    kinds = {torch.float16: "*fp16", torch.uint32: "*u32", torch.float32: "*fp32", int: "i32", float: "fp32"}
    found = [kinds[each.dtype if isinstance(each, torch.Tensor) else type(each)] for each in operands]
    # A code without a table reads none: any pointer will do.
    assert found[:2] + found[3:] == [*case.signature.values()][:2] + [*case.signature.values()][3:]
    assert found[2] == case.signature["lut_ptr"] or code == "1mad"
    assert operands[0].shape == (3, 64)
    assert options["num_warps"] == case.num_warps


def test_rows_in_the_products_order_are_for_the_kernel_that_reads_it(device):
    with pytest.raises(SpecError, match="reads them as they are"):
        gpu.partial_products(torch.zeros(1, 64, device=device), packed(SPEC, 32, 64).to(device), SPEC, in_fragments=True)


def test_what_does_not_fit_is_refused(device, monkeypatch):
    trellis = packed(SPEC, 32, 64).to(device)
    with pytest.raises(SpecError, match="17 rows"):
        gpu.matvec(torch.zeros(17, 64, device=device), trellis, SPEC)
    with pytest.raises(SpecError, match="bfloat16"):
        gpu.matvec(torch.zeros(1, 64, device=device, dtype=torch.bfloat16), trellis, SPEC)
    with pytest.raises(SpecError, match="48 columns: this packed matrix multiplies 64"):
        gpu.matvec(torch.zeros(1, 48, device=device), trellis, SPEC)
    monkeypatch.setattr("qtipcli_kernels.device.INTERPRETED", False)
    with pytest.raises(DeviceError, match="no Triton kernel for cpu"):
        gpu.matvec(torch.zeros(1, 64), trellis.cpu(), SPEC)

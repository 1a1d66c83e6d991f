"""RoIAlign: our kernel's source as plain C++, under NVRTC and on a GPU, beside torchvision's op and naive loops."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from aligndet.ops import cuda_module, nvrtc
from aligndet.ops.cuda_module import blocks_of
from aligndet.ops.roi_align import by_torchvision, level_of, multilevel_roi_align
from aligndet.ops.roi_align_cpu import by_sums
from aligndet.ops.roi_align_cuda import CallStruct, Grid, Kernels, RoIAlign, fits
from tests import reference

STRIDES = (4, 8, 16, 32)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Emulator:
    """Runs the kernels on the processor, thread after thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.launched: list[str] = []

    def launch(self, name: str, items: int, lanes: int, parameters: ctypes.Structure) -> None:
        assert items > 0
        blocks, threads = blocks_of(items, lanes)
        assert self.library.emulate(name.encode(), ctypes.byref(parameters), blocks, *threads) == 0, name
        self.launched.append(name)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("roi_align") / "emulated.so"
    # -ffp-contract=off: as torchvision's op for processors is built.
    flags = ["-std=c++17", "-O2", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
    source = Path(__file__).with_name("roi_align_emulated.cpp")
    command = [compiler, *flags, f"-I{nvrtc.SOURCES}", str(source), "-o", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = ctypes.CDLL(str(path))
    loaded.size_of_call.restype = ctypes.c_size_t
    return loaded


@pytest.fixture
def emulator(library: ctypes.CDLL) -> Emulator:
    return Emulator(library)


def maps_of(channels: int, *, last: bool = True, top: tuple[int, int] = (37, 53)) -> list[Tensor]:
    """Maps [2, channels, H, W] of four levels, the coarsest of few px, with graphs."""
    memory_format = torch.channels_last if last else torch.contiguous_format
    shapes = [(2, channels, -(-top[0] // 2**i), -(-top[1] // 2**i)) for i in range(4)]
    return [torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_() for shape in shapes]


def boxes_of(number: int) -> tuple[Tensor, Tensor]:
    """Boxes of all sizes in 148 x 212 px, some beyond, and the odd ones."""
    corner = torch.rand(number, 2) * torch.tensor([230.0, 165]) - 15
    random = torch.cat([corner, corner + torch.exp(torch.rand(number, 2) * 6)], dim=1)
    odd = torch.tensor(
        [
            [20.0, 30, 20, 30],  # no area
            [40, 50, 40, 90],  # no width
            [90, 80, 40, 20],  # inverted
            [90, 20, 40, 80],  # inverted on one axis
            [0, 0, 212, 148],  # the image
            [0, 0, 1e-3, 1e-3],
            [-300, -300, -200, -250],  # outside
            [500, 500, 600, 600],
            [-900, -700, 1500, 1900],  # around everything
            [208, 144, 212, 148],  # the last px
            [-4, -4, 4, 4],
        ]
    )
    boxes = torch.cat([random, odd])
    return boxes, torch.arange(len(boxes)) % 2


def both(
    kernels: Kernels, levels: list[Tensor], boxes: Tensor, image: Tensor, grid: Grid
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Per side, ours and torchvision's: the output, and the gradients of all levels for one random gradient of it."""
    # Not by size, so that every level meets every kind of box.
    level = torch.arange(len(boxes), device=boxes.device) // 2 % len(levels)
    arguments = (boxes.float().contiguous(), image, level)
    outputs = [
        RoIAlign.apply(kernels, grid, *arguments, *levels),
        by_torchvision(levels, boxes, image, level, grid),
    ]
    gradient = torch.randn(outputs[0].shape, device=boxes.device).to(outputs[0].dtype)
    return [([output], list(torch.autograd.grad(output, levels, gradient))) for output in outputs]


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    """Beside the largest number, or beside 1 where that is less."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        largest = max(float(b.detach().abs().max()) if b.numel() else 0.0, 1.0)
        assert b.numel() == 0 or float((a.detach().double() - b.detach().double()).abs().max()) <= tolerance * largest


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
@pytest.mark.parametrize(("channels", "last"), [(3, True), (3, False), (16, True)])
def test_kernels_agree_with_torchvision(
    emulator: Emulator, aligned: bool, ratio: int, channels: int, last: bool
) -> None:
    levels = maps_of(channels, last=last)
    boxes, image = boxes_of(41)
    ours, theirs = both(emulator, levels, boxes, image, Grid(5, STRIDES, ratio, aligned))
    assert_close(ours[0], theirs[0], 1e-5)
    assert_close(ours[1], theirs[1], 1e-5)
    assert sum(float(gradient.abs().sum()) > 0 for gradient in ours[1]) == 4
    each = 8 if channels == 16 else 1
    names = [f"roi_align_pool_float32_{each}", "roi_align_list", f"roi_align_gather_float32_{each}"]
    assert emulator.launched == names
    memory_format = torch.channels_last if last else torch.contiguous_format
    assert all(tensor.is_contiguous(memory_format=memory_format) for tensor in ours[0] + ours[1])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_kernels_agree_with_a_naive_version(emulator: Emulator, aligned: bool, ratio: int) -> None:
    features = torch.randn(2, 3, 5, 7, dtype=torch.float64).float().requires_grad_()
    boxes = torch.tensor([[1.0, 2, 23, 15], [-9, -7, 13, 41], [30, 5, 9, 17], [8, 8, 8, 8], [3, 3, 5, 4]])
    image, zeros = torch.tensor([0, 1, 0, 1, 1]), torch.zeros(5, dtype=torch.int64)
    ours = RoIAlign.apply(emulator, Grid(3, (4,), ratio, aligned), boxes, image, zeros, features)
    exact = features.detach().double().requires_grad_()
    parts = [
        reference.roi_align(exact[number], box, 3, 4, ratio, aligned)
        for number, box in zip(image.tolist(), boxes.tolist(), strict=True)
    ]
    naive = torch.stack(parts)
    gradient = torch.randn_like(ours)
    assert float((ours - naive).detach().abs().max()) < 1e-5
    (mine,) = torch.autograd.grad(ours, features, gradient)
    (true,) = torch.autograd.grad(naive, exact, gradient.double())
    assert float((mine - true).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 8])
def test_kernels_for_16_bits(emulator: Emulator, dtype: torch.dtype, channels: int) -> None:
    levels = [level.detach().to(dtype).requires_grad_() for level in maps_of(channels)]
    boxes, image = boxes_of(43)
    ours, theirs = both(emulator, levels, boxes, image, Grid(7, STRIDES, 0, True))
    # Both add up in float32 and round once: half a unit in the last place, twice.
    tolerance = torch.finfo(dtype).eps * 1.01
    assert_close(ours[0], theirs[0], tolerance)
    assert_close(ours[1], theirs[1], tolerance)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("top", [(1, 1), (1, 9), (4, 5), (8, 3)])
def test_small_maps_and_huge_boxes(emulator: Emulator, top: tuple[int, int], aligned: bool) -> None:
    levels = maps_of(2, top=top)
    boxes, image = boxes_of(19)
    for size, ratio in ((1, 0), (2, 1), (3, 5)):
        ours, theirs = both(emulator, levels, boxes, image, Grid(size, STRIDES, ratio, aligned))
        assert_close(ours[0], theirs[0], 1e-5)
        assert_close(ours[1], theirs[1], 1e-5)


@pytest.mark.parametrize("stride", [7, 4.3, 3])
def test_strides_that_are_no_powers_of_two(emulator: Emulator, stride: float) -> None:
    levels = maps_of(3)[:1]
    boxes, image = boxes_of(64)
    zeros = torch.zeros_like(image)
    ours = RoIAlign.apply(emulator, Grid(3, (stride,), 2, True), boxes, image, zeros, *levels)
    rois = torch.cat([image[:, None].float(), boxes], dim=1)
    theirs = torchvision_roi_align(levels[0], rois, 3, 1 / stride, 2, True)
    assert_close([ours], [theirs], 1e-5)


def test_without_boxes_there_is_a_graph_with_zeros(emulator: Emulator) -> None:
    levels = maps_of(3)
    none = torch.zeros(0, dtype=torch.int64)
    pooled = RoIAlign.apply(emulator, Grid(5, STRIDES, 0, True), torch.zeros(0, 4), none, none, *levels)
    assert pooled.shape == (0, 3, 5, 5)
    gradients = torch.autograd.grad(pooled.sum(), levels)
    assert all(
        torch.equal(gradient, torch.zeros_like(level)) for gradient, level in zip(gradients, levels, strict=True)
    )
    assert emulator.launched == ["roi_align_gather_float32_1"]


def test_boxes_that_are_no_numbers_give_zeros_and_end(emulator: Emulator) -> None:
    levels = maps_of(3)
    boxes = torch.tensor([[float("nan"), 0, 9, 9], [0, 0, float("inf"), 9], [-1e38, -1e38, 1e38, 1e38]])
    rows = torch.zeros(3, dtype=torch.int64)
    pooled = RoIAlign.apply(emulator, Grid(5, STRIDES, 0, True), boxes, rows, rows, *levels)
    assert torch.equal(pooled, torch.zeros_like(pooled))
    assert all(not gradient.any() for gradient in torch.autograd.grad(pooled.sum(), levels))


def test_infinite_gradients_arrive(emulator: Emulator) -> None:
    """The scaler of fp16 training looks for them."""
    levels = maps_of(3)
    boxes, rows = torch.tensor([[0.0, 0, 20, 20]]), torch.zeros(1, dtype=torch.int64)
    pooled = RoIAlign.apply(emulator, Grid(5, STRIDES, 0, True), boxes, rows, rows, *levels)
    gradients = torch.autograd.grad(pooled, levels, torch.full_like(pooled, torch.inf))
    assert gradients[0].isinf().any() and not gradients[0].isnan().any()


def test_struct_has_the_layout_of_the_header(library: ctypes.CDLL) -> None:
    assert library.size_of_call() == ctypes.sizeof(CallStruct)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_are_those_of_torch(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    up, down = (library.halves, library.to_halves) if dtype is torch.float16 else (library.bfloats, library.to_bfloats)
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    floats = torch.empty(2**16)
    up(ctypes.c_void_p(bits.data_ptr()), ctypes.c_void_p(floats.data_ptr()), 2**16)
    expected = bits.view(dtype).float()
    assert torch.equal(floats.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5))
    assert torch.equal(floats.isnan(), expected.isnan())
    # All of them, what lies between neighbours, and numbers of all exponents.
    finite = expected[expected.isfinite()].sort().values
    between = (finite[1:].double() + finite[:-1].double()) / 2
    near = torch.cat([between * (1 + 2.0**-23), between * (1 - 2.0**-23), between]).float()
    wild = torch.randint(-(2**31), 2**31, (100_003,)).to(torch.int32).view(torch.float32)
    values = torch.cat([expected, near, wild])
    rounded = torch.empty(len(values), dtype=torch.int16)
    down(ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(rounded.data_ptr()), len(values))
    ours, theirs = rounded.view(dtype), values.to(dtype)
    assert torch.equal(ours.isnan(), theirs.isnan())
    real = ~theirs.isnan()
    assert torch.equal(rounded[real], theirs.view(torch.int16)[real])


def test_on_the_processor_one_line_names_the_sums(caplog: pytest.LogCaptureFixture) -> None:
    cuda_module.say_once.cache_clear()
    levels, (boxes, image) = maps_of(3), boxes_of(5)
    with caplog.at_level(logging.INFO, logger="aligndet"):
        for _ in range(2):
            multilevel_roi_align(levels, boxes, image, 7, strides=STRIDES)
    assert [record.getMessage() for record in caplog.records] == ["roi_align: weighted sums on the processor"]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_processor_keeps_type_and_memory_format(dtype: torch.dtype, last: bool) -> None:
    levels = [level.to(dtype) for level in maps_of(3, last=last)]
    boxes, image = boxes_of(5)
    pooled = multilevel_roi_align(levels, boxes, image, 7, strides=STRIDES)
    assert pooled.dtype == dtype
    assert pooled.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_weighted_sums_equal_torchvision_in_double_precision(sampling_ratio: int, aligned: bool, last: bool) -> None:
    torch.manual_seed(0)
    grid, levels = Grid(7, STRIDES, sampling_ratio, aligned), maps_of(5, last=last)
    boxes, image = boxes_of(211)
    level = level_of(boxes, 4)
    pooled = by_sums(levels, boxes, image, level, grid)
    assert pooled is not None and pooled.shape == (len(boxes), 5, 7, 7)
    exact = [feature.detach().double().requires_grad_() for feature in levels]
    # The boxes of single precision: torchvision would compute the samples' places in double.
    expected = by_torchvision(exact, boxes, image, level, grid)
    single = by_torchvision(levels, boxes, image, level, grid)
    # A sample within rounding of the border may count or not; there single precision agrees with itself.
    border = (single - expected).abs() > 1e-3
    assert int(border.sum()) < 100
    assert (pooled - expected)[~border].abs().max() < 5e-5
    assert (pooled - single).abs().max() < 5e-5
    gradient = torch.randn_like(pooled)
    ours, theirs = (torch.autograd.grad(part, levels, gradient) for part in (pooled, single))
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) < 2e-4


def test_weighted_sums_equal_the_naive_loop() -> None:
    torch.manual_seed(0)
    levels = maps_of(3)
    boxes, image = boxes_of(13)
    boxes, image = boxes[:13].round(), image[:13]  # whole numbers: places of samples are exact enough
    level = level_of(boxes, 4)
    pooled = by_sums(levels, boxes, image, level, Grid(7, STRIDES, 2, True))
    assert pooled is not None
    for row, box in enumerate(boxes.tolist()):
        here = int(level[row])
        expected = reference.roi_align(levels[here][image[row]].detach(), box, 7, STRIDES[here], 2, True)
        assert (pooled[row] - expected).abs().max() < 1e-5


def test_weighted_sums_leave_to_torchvision_what_does_not_suit_them() -> None:
    grid, levels, (boxes, image) = Grid(7, STRIDES, 0, True), maps_of(3), boxes_of(5)
    level = level_of(boxes, 4)
    assert by_sums(levels, boxes[:0], image[:0], level[:0], grid) is None
    assert by_sums([feature.double() for feature in levels], boxes, image, level, grid) is None
    huge = boxes.clone()
    huge[0] = torch.tensor([0.0, 0, 1e6, 1e6])
    assert by_sums(levels, huge, image, level_of(huge, 4), grid) is None
    huge[0, 2] = torch.nan
    assert by_sums(levels, huge, image, level, grid) is None


def test_what_the_kernel_cannot_take_goes_to_torchvision() -> None:
    grid, levels = Grid(7, STRIDES, 0, True), maps_of(3)
    assert fits(levels, 1000, grid)
    assert not fits([level.double() for level in levels], 1000, grid)
    assert not fits([levels[0], levels[1].half()], 1000, grid)
    assert not fits(levels * 3, 1000, grid)
    assert not fits(levels, 2**27, grid)


def test_results_are_spread_over_blocks() -> None:
    assert blocks_of(98_000, 32) == (24_500, (32, 4))
    assert blocks_of(97, 3) == (4, (4, 32))
    assert blocks_of(1, 1) == (1, (1, 128))
    assert blocks_of(5, 300) == (2, (32, 4))


@pytest.fixture
def compiler() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda.bindings comes with torch's CUDA wheels")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "compute_90"])
def test_the_cuda_source_compiles(target: str) -> None:
    if int(target.partition("_")[2]) not in nvrtc.architectures():
        pytest.skip(f"this NVRTC no longer knows {target}")
    code = nvrtc.compile_source("roi_align", target)
    assert (code[:4] == b"\x7fELF") == target.startswith("sm_")
    for dtype in ("float32", "float16", "bfloat16"):
        for each in (1, 8):
            assert f"roi_align_pool_{dtype}_{each}".encode() in code
            assert f"roi_align_gather_{dtype}_{each}".encode() in code
    assert b"roi_align_list" in code


@pytest.mark.usefixtures("compiler")
def test_code_is_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nvrtc, "compile_source", lambda name, target: compiled.append(name) or b"code")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [nvrtc.cached_code("roi_align", "sm_90") for _ in range(2)] == [b"code"] * 2
    assert len(compiled) == 1
    nvrtc.cached_code("roi_align", "sm_80")
    nvrtc.cached_code("roi_align", "sm_80", fresh=True)
    assert len(compiled) == 3
    assert len(list((tmp_path / "aligndet").iterdir())) == 2
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be written below a file
    assert [nvrtc.cached_code("roi_align", "sm_90") for _ in range(2)] == [b"code"] * 2
    assert len(compiled) == 5


@pytest.mark.usefixtures("compiler")
def test_targets() -> None:
    known = nvrtc.architectures()
    assert nvrtc.target_of(divmod(known[0], 10)) == f"sm_{known[0]}"
    assert nvrtc.target_of((99, 0)) == f"compute_{known[-1]}"
    with pytest.raises(nvrtc.NoKernelError, match="capability"):
        nvrtc.target_of((2, 0))


@pytest.mark.usefixtures("compiler")
def test_an_error_of_the_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong.cu").write_text('extern "C" __global__ void wrong() { nonsense; }')
    monkeypatch.setattr(nvrtc, "SOURCES", tmp_path)
    with pytest.raises(nvrtc.NoKernelError, match="nonsense"):
        nvrtc.compile_source("wrong", f"sm_{nvrtc.architectures()[-1]}")


def test_where_the_kernel_cannot_be_had_torchvision_takes_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str, device: int) -> None:
        raise nvrtc.NoKernelError("driver too old")

    monkeypatch.setattr(cuda_module, "Module", refuse)
    cuda_module.module_for.cache_clear()
    cuda_module.say_once.cache_clear()
    assert cuda_module.module_for("roi_align", 0) is None
    assert cuda_module.module_for("roi_align", 0) is None
    cuda_module.module_for.cache_clear()
    (record,) = caplog.records
    assert record.getMessage() == "roi_align: torchvision's op, ours cannot be used here (driver too old)"


@gpu
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("channels", [3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("ratio", "aligned"), [(0, True), (2, True), (0, False), (2, False)])
def test_gpu_agrees_with_torchvision(ratio: int, aligned: bool, dtype: torch.dtype, channels: int, last: bool) -> None:
    module = cuda_module.module_for("roi_align", 0)
    assert module is not None
    levels = [level.detach().to("cuda", dtype).requires_grad_() for level in maps_of(channels, last=last)]
    boxes, image = (tensor.cuda() for tensor in boxes_of(301))
    ours, theirs = both(module, levels, boxes, image, Grid(7, STRIDES, ratio, aligned))
    # A GPU fuses products and sums, ours and theirs in different places.
    tolerance = 3e-5 if dtype == torch.float32 else torch.finfo(dtype).eps * 1.01
    assert_close(ours[0], theirs[0], tolerance)
    assert_close(ours[1], theirs[1], tolerance)


@gpu
def test_gpu_gradients_repeat_to_the_last_bit() -> None:
    levels = [level.detach().cuda().requires_grad_() for level in maps_of(64)]
    boxes, image = (tensor.cuda() for tensor in boxes_of(901))
    pooled = multilevel_roi_align(levels, boxes, image, 7, strides=STRIDES)
    gradient = torch.randn_like(pooled)
    first, *others = (torch.autograd.grad(pooled, levels, gradient, retain_graph=True) for _ in range(5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@gpu
def test_gpu_does_not_wait_and_can_be_captured() -> None:
    levels = [level.detach().cuda().requires_grad_() for level in maps_of(64)]
    boxes, image = (tensor.cuda() for tensor in boxes_of(101))

    def step() -> tuple[Tensor, ...]:
        pooled = multilevel_roi_align(levels, boxes, image, 7, strides=STRIDES)
        return (pooled, *torch.autograd.grad(pooled, levels, torch.ones_like(pooled)))

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))

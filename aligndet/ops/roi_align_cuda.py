"""RoIAlign by our own kernel: all levels in one launch, gradients without atomics."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

MAX_LEVELS = 8
TILE = 4  # px per side; as in roi_align.h
SUFFIXES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
MOST = 2**31 - 2**10  # results of one launch


class LevelStruct(ctypes.Structure):
    """``Level`` of roi_align.h."""

    _fields_ = (
        ("pixels", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("first_pixel", ctypes.c_int),
        ("first_tile", ctypes.c_int),
        ("reserved", ctypes.c_int),
    )


class CallStruct(ctypes.Structure):
    """``Call`` of roi_align.h."""

    _fields_ = (
        ("levels", LevelStruct * MAX_LEVELS),
        *((name, ctypes.c_void_p) for name in ("boxes", "image", "level", "pooled", "touching")),
        *((name, ctypes.c_int) for name in ("level_count", "batch", "channels", "rois", "size", "sampling_ratio")),
        *((name, ctypes.c_int) for name in ("aligned", "words", "items", "reserved")),
    )


class Kernels(Protocol):
    """What runs the kernels: a GPU, or in tests the processor."""

    def launch(self, name: str, items: int, lanes: int, parameters: ctypes.Structure) -> None:
        """Start kernel ``name`` for ``items`` results, each of which ``lanes`` threads can share."""
        ...


@dataclass(frozen=True)
class Grid:
    """How boxes become cells.

    Attributes:
        size: S, cells per side.
        strides: px per cell of each map.
        sampling_ratio: samples per cell and axis; 0 adapts to the box.
        aligned: pixel centres at half-integers.
    """

    size: int
    strides: tuple[int, ...]
    sampling_ratio: int
    aligned: bool


def fits(levels: list[Tensor], rois: int, grid: Grid) -> bool:
    """Whether the kernel can take these maps: one known type, sizes within its integers."""
    pixels = sum(level.shape[0] * level.shape[2] * level.shape[3] for level in levels)
    tiles = sum(level.shape[0] * -(-level.shape[2] // TILE) * -(-level.shape[3] // TILE) for level in levels)
    return (
        len(levels) <= MAX_LEVELS
        and len({(level.dtype, level.shape[:2]) for level in levels}) == 1
        and levels[0].dtype in SUFFIXES
        and grid.size <= 1024
        and grid.sampling_ratio <= 1024
        and max(rois * grid.size**2, pixels, tiles * -(-rois // 32)) < MOST
    )


class RoIAlign(torch.autograd.Function):
    """[N, C, S, S] of boxes from maps [B, C, H_l, W_l], in the maps' type and memory format.

    The kernel works channels-last, where a warp reads neighbouring channels at once; other maps are copied.
    Boxes stay float32 whatever the maps are (bfloat16 has steps of 4 px at 1000), and sums are float32.

    The gradient is gathered: bits tell for each square of 4 x 4 px which regions touch it, and each pixel adds up what
    the cells of these give it, in ascending order. Atomic floats would add in an order that changes from run to run;
    atomic fixed-point numbers would not, but need eight bytes per feature, and infinite gradients, by which the scaler
    of fp16 training sees an overflow, would be lost.

    Nothing waits for the device, so that a CUDA graph can hold both directions once the kernels are loaded.
    """

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, grid: Grid, boxes: Tensor, image: Tensor, level: Tensor, *levels: Tensor
    ) -> Tensor:
        """See multilevel_roi_align; ``boxes`` float32 [N, 4], ``image`` and ``level`` int64 [N], all contiguous."""
        maps = [features.contiguous(memory_format=torch.channels_last) for features in levels]
        pooled = _empty(maps[0], (len(boxes), maps[0].shape[1], grid.size, grid.size))
        call = _call(grid, maps, (boxes, image, level, pooled))
        _launch(kernels, "pool", len(boxes) * grid.size**2, call, [*maps, pooled])
        ctx.save_for_backward(boxes, image, level)
        ctx.kernels, ctx.grid = kernels, grid
        ctx.shapes = [(features.shape, features.is_contiguous()) for features in levels]
        return pooled.contiguous() if levels[0].is_contiguous() else pooled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of each map, dense; zeros where no box is."""
        boxes, image, level = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        maps = [_empty(gradient, shape) for shape, _ in ctx.shapes]
        call = _call(ctx.grid, maps, (boxes, image, level, gradient))
        last, bottom = call.levels[len(maps) - 1], maps[-1].shape
        tiles = last.first_tile + bottom[0] * -(-bottom[2] // TILE) * -(-bottom[3] // TILE)
        pixels = last.first_pixel + bottom[0] * bottom[2] * bottom[3]
        call.words = -(-len(boxes) // 32)
        touching = torch.empty(tiles * call.words, dtype=torch.int32, device=boxes.device)
        call.touching, call.items = touching.data_ptr(), tiles * call.words
        if call.items:
            ctx.kernels.launch("roi_align_list", call.items, 1, call)
        _launch(ctx.kernels, "gather", pixels, call, [*maps, gradient])
        laid_out = [m.contiguous() if plain else m for m, (_, plain) in zip(maps, ctx.shapes, strict=True)]
        return None, None, None, None, None, *laid_out


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _call(grid: Grid, maps: list[Tensor], rows: tuple[Tensor, Tensor, Tensor, Tensor]) -> CallStruct:
    """All but lists and number of results; ``rows``: boxes, their images and levels, and [N, C, S, S]."""
    boxes, image, level, pooled = rows
    batch, channels = maps[0].shape[:2]
    call = CallStruct()
    pixels = tiles = 0
    for number, (features, stride) in enumerate(zip(maps, grid.strides, strict=True)):
        height, width = features.shape[2:]
        call.levels[number] = LevelStruct(features.data_ptr(), 1 / stride, height, width, pixels, tiles, 0)
        pixels += batch * height * width
        tiles += batch * -(-height // TILE) * -(-width // TILE)
    call.boxes, call.image, call.level = boxes.data_ptr(), image.data_ptr(), level.data_ptr()
    call.pooled, call.level_count, call.batch, call.channels = pooled.data_ptr(), len(maps), batch, channels
    call.rois, call.size, call.sampling_ratio = len(boxes), grid.size, grid.sampling_ratio
    call.aligned = int(grid.aligned)
    return call


def _launch(kernels: Kernels, name: str, items: int, call: CallStruct, tensors: list[Tensor]) -> None:
    """With eight channels per thread where each of the tensors can be read in pieces of 16 bytes."""
    call.items = items
    wide = call.channels % 8 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    each = 8 if wide else 1
    if items and call.channels:
        kernels.launch(f"roi_align_{name}_{SUFFIXES[tensors[0].dtype]}_{each}", items, call.channels // each, call)

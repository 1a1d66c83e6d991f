"""DETR's transformer: encoder over cells, decoder from queries; Carion et al. (arXiv:2005.12872), appendix A.3."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TEMPERATURE = 10_000.0  # ratio of the slowest wave of the positions to the fastest
TURN = 2 * math.pi  # the position of an image's last row and column


class Attention(nn.MultiheadAttention):
    """Multi-head attention without the weights as an output, so that the fused kernels serve it."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__(channels, heads, dropout, batch_first=True)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> Tensor:
        """``query [B, Q, C]``, ``key`` and ``value`` [B, P, C] -> [B, Q, C]; ``hidden`` bool [B, P]: not looked at."""
        attended: Tensor = self(query, key, value, key_padding_mask=hidden, need_weights=False)[0]
        return attended


class FeedForward(nn.Module):
    """Two linear layers with ReLU and dropout between them."""

    def __init__(self, channels: int, width: int, dropout: float) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(channels, width), nn.Linear(width, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., C]``."""
        outputs: Tensor = self.outer(self.dropout(self.inner(x).relu_()))
        return outputs


class EncoderLayer(nn.Module):
    """Cells look at each other; norms after the sums."""

    def __init__(self, channels: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(channels, heads, dropout)
        self.feed_forward = FeedForward(channels, width, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, cells: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
        """``cells`` and ``positions`` [B, P, C], ``hidden`` bool [B, P] -> [B, P, C]."""
        key = cells + positions
        cells = self.norms[0](cells + self.dropout(self.attention.attend(key, key, cells, hidden)))
        cells = self.norms[1](cells + self.dropout(self.feed_forward(cells)))
        return cells


class DecoderLayer(nn.Module):
    """Queries look at each other, then at the cells; norms after the sums."""

    def __init__(self, channels: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(channels, heads, dropout)
        self.cross_attention = Attention(channels, heads, dropout)
        self.feed_forward = FeedForward(channels, width, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, objects: Tensor, queries: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
        """``objects`` and ``queries`` [B, Q, C], ``key`` and ``value`` [B, P, C], ``hidden`` bool [B, P]."""
        own = objects + queries
        objects = self.norms[0](objects + self.dropout(self.attention.attend(own, own, objects)))
        seen = self.cross_attention.attend(objects + queries, key, value, hidden)
        objects = self.norms[1](objects + self.dropout(seen))
        objects = self.norms[2](objects + self.dropout(self.feed_forward(objects)))
        return objects


class Transformer(nn.Module):
    """Cells of one feature map -> what each query knows after each decoder layer.

    Args:
        channels: C, a multiple of ``heads``.
        queries: Q.
        layers: numbers of encoder and of decoder layers.
        heads: of every attention.
        width: hidden width of the feed-forward layers.
        dropout: of attention weights, of each branch before its sum, and inside the feed-forward layers.

    Source:
        Method section 1.5: norms after the sums, no norm after the encoder, one after every decoder layer's output;
        matrices Xavier-uniform, query embeddings N(0, 1).
    """

    def __init__(
        self,
        channels: int,
        queries: int,
        *,
        layers: tuple[int, int] = (6, 6),
        heads: int = 8,
        width: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(EncoderLayer(channels, heads, width, dropout) for _ in range(layers[0]))
        self.decoder = nn.ModuleList(DecoderLayer(channels, heads, width, dropout) for _ in range(layers[1]))
        self.norm = nn.LayerNorm(channels)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.queries = nn.Embedding(queries, channels)

    def forward(self, cells: Tensor, inside: tuple[Tensor, Tensor]) -> Tensor:
        """Run both halves.

        Args:
            cells: float [B, C, H, W].
            inside: bool [B, H] and bool [B, W], rows and columns of cells that belong to the image, not to its padding.

        Returns:
            [L, B, Q, C], the decoder layers' outputs in their order.
        """
        rows, columns = inside
        hidden = ~(rows[:, :, None] & columns[:, None, :]).flatten(1)  # [B, P]
        value = cells.flatten(2).transpose(1, 2)  # [B, P, C]
        positions = sine_positions(rows, columns, cells.shape[1]).to(value.dtype)
        for layer in self.encoder:
            value = layer(value, positions, hidden)
        key = value + positions
        queries = self.queries.weight.expand(len(cells), -1, -1).to(value.dtype)
        objects = torch.zeros_like(queries)
        outputs = []
        for layer in self.decoder:
            objects = layer(objects, queries, key, value, hidden)
            outputs.append(self.norm(objects))
        return torch.stack(outputs)


def sine_positions(rows: Tensor, columns: Tensor, channels: int) -> Tensor:
    """Where each cell stands in its image, as sine waves: float32 [B, H * W, C].

    The first half of the channels speaks of the row, the second of the column; in each, sines and cosines alternate
    over wavelengths from one turn to TEMPERATURE turns. The last row or column of an image stands at one turn.

    Args:
        rows, columns: bool [B, H] and bool [B, W], which belong to the image.
        channels: C, a multiple of 4.

    Source:
        Method section 1.5; Attention Is All You Need (arXiv:1706.03762), section 3.5.
    """
    waves = channels // 2
    exponent = torch.arange(waves, device=rows.device) // 2 * 2 / waves
    parts = []
    for inside in (rows, columns):
        number = inside.cumsum(1, dtype=torch.float32)  # counted from 1
        angle = (number / (number[:, -1:] + 1e-6) * TURN)[:, :, None] / TEMPERATURE**exponent  # [B, H, C / 2]
        parts.append(torch.stack([angle[:, :, 0::2].sin(), angle[:, :, 1::2].cos()], dim=3).flatten(2))
    y, x = parts
    shape = (len(rows), rows.shape[1], columns.shape[1], waves)
    return torch.cat([y[:, :, None].expand(shape), x[:, None].expand(shape)], dim=3).flatten(1, 2)


def inside_cells(sizes: Tensor, padded: Tensor, cells: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which rows and columns of a feature map show each image: bool [B, H] and bool [B, W].

    A cell belongs to the image where the pixel that nearest-neighbour reduction takes for it does.

    Args:
        sizes: int64 [B, 2], (height, width) px of the images.
        padded: int64 [2], (height, width) px of the tensor they stand in.
        cells: (H, W) of the map.
    """
    found = []
    for axis, number in enumerate(cells):
        pixel = torch.arange(number, device=sizes.device) * (padded[axis].float() / number)
        found.append(pixel.floor() < sizes[:, axis : axis + 1])
    return found[0], found[1]

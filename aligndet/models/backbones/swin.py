"""Swin Transformer with torchvision's topology and weight names; Liu et al. (arXiv:2103.14030)."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

from aligndet.models.backbones.norm import freeze

# Channels of the first stage, blocks and heads of the four.
SWINS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "swin_t": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_l": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
WINDOW = 7  # patches


class Swin(nn.Module):
    """``[B, 3, H, W] -> [C2, C3, C4, C5]``, each layer-normed, for any H and W.

    Args:
        name: key of SWINS.
        width: channel multiplier; heads stay, their width changes.
        frozen_stages: 0 .. 4; 1 is the patch embedding and the first stage.
        drop_path: share of residual branches dropped in the last block, rising linearly from 0; in training only.

    Source:
        Method section 1.7: drop-path 0.2, layer norm after each stage.
    """

    def __init__(self, name: str, width: float = 1.0, frozen_stages: int = 1, drop_path: float = 0.2) -> None:
        super().__init__()
        channels, depths, heads = SWINS[name]
        per_head = max(1, round(channels / heads[0] * width))
        body = SwinTransformer(
            [4, 4],
            per_head * heads[0],
            list(depths),
            list(heads),
            [WINDOW, WINDOW],
            stochastic_depth_prob=drop_path,
            num_classes=1,
        )
        self.strides = (4, 8, 16, 32)
        self.channels = tuple(per_head * heads[0] * 2**stage for stage in range(4))
        self.features = body.features  # embedding, then stages with a merging of patches between them
        self.norms = nn.ModuleList(nn.LayerNorm(number) for number in self.channels)
        self.freeze(frozen_stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features at strides 4, 8, 16, 32."""
        outputs = []
        for number, layer in enumerate(self.features):
            x = layer(x)  # [B, H', W', C]
            if number % 2:
                outputs.append(self.norms[number // 2](x).permute(0, 3, 1, 2))
        return outputs

    def train(self, mode: bool = True) -> Swin:
        """Training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        self.freeze(self.frozen_stages)
        return self

    def freeze(self, stages: int) -> None:
        """Keep the first ``stages`` out of training from now on; a stage once frozen is not thawed by fewer."""
        self.frozen_stages = stages
        freeze([*self.features[: 2 * stages], *self.norms[:stages]])


# Microsoft's names (also SimMIM's) on the left, torchvision's on the right.
RENAMED = (
    (r"^encoder\.", ""),
    (r"^patch_embed\.proj\.", "features.0.0."),
    (r"^patch_embed\.norm\.", "features.0.2."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the layout of the authors' repository, or SimMIM's, under torchvision's names.

    Both join the neighbours of a merged patch in the same order, so values stay as they are. Buffers that follow from
    the window and what only a classifier or a decoder has are left out. Weights in torchvision's layout come back as
    they are.
    """
    if not any(re.match(r"(encoder\.)?(layers\.|patch_embed\.)", name) for name in state):
        return state
    renamed = {}
    for name, value in state.items():
        if name.startswith(("decoder.", "head.")) or "attn_mask" in name or "relative_position_index" in name:
            continue
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        stage = re.match(r"layers\.(\d+)\.(blocks|downsample)\.", name)
        if stage:
            place = 2 * int(stage[1]) + (1 if stage[2] == "blocks" else 2)
            name = f"features.{place}." + name[stage.end() :]
        if name.endswith("relative_position_bias_table"):
            value = value.reshape(-1, value.shape[-1])
        renamed[name] = value
    return renamed


def resized_tables(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tables of relative positions brought to the window of the model, bicubically; everything else as it is."""
    changed = dict(state)
    for name, value in state.items():
        if name.endswith("relative_position_bias_table") and name in own and own[name].shape[1] == value.shape[1]:
            wanted, given = round(len(own[name]) ** 0.5), round(len(value) ** 0.5)
            if wanted != given:
                grid = value.T.reshape(1, -1, given, given).float()
                grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
                changed[name] = grid.reshape(value.shape[1], -1).T.contiguous().to(value.dtype)
    return changed

"""Claims about mmdet's and detectron2's weights: made-up files with their names, computed by hand beside ours."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aligndet.cli import main
from aligndet.interop import detectron2, mmdet
from aligndet.models import RetinaNet, build_detector
from aligndet.models.fcos import FCOS, FCOSCandidates
from aligndet.models.retinanet import RetinaNetCandidates
from aligndet.weights import load_detector

State = dict[str, Tensor]


def norm(prefix: str, width: int, counted: bool = True) -> State:
    state = {f"{prefix}.weight": torch.rand(width) + 0.5, f"{prefix}.bias": torch.randn(width) * 0.1}
    state |= {f"{prefix}.running_mean": torch.randn(width) * 0.1, f"{prefix}.running_var": torch.rand(width) + 0.5}
    return state | ({f"{prefix}.num_batches_tracked": torch.tensor(5)} if counted else {})


def layer(prefix: str, *shape: int, bias: bool = True) -> State:
    scale = (2 / max(1, math.prod(shape[1:]))) ** 0.5
    state = {f"{prefix}.weight": torch.randn(shape) * scale}
    return state | ({f"{prefix}.bias": torch.randn(shape[0]) * 0.1} if bias else {})


def resnet_of_mmdet() -> State:
    state = layer("backbone.conv1", 64, 3, 7, 7, bias=False) | norm("backbone.bn1", 64)
    inputs = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(depth):
            here = f"backbone.layer{stage + 1}.{block}"
            shapes = ((width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1))
            for i, shape in enumerate(shapes, 1):
                state |= layer(f"{here}.conv{i}", *shape, bias=False) | norm(f"{here}.bn{i}", shape[0])
            if block == 0:
                state |= layer(f"{here}.downsample.0", 4 * width, inputs, 1, 1, bias=False)
                state |= norm(f"{here}.downsample.1", 4 * width)
            inputs = 4 * width
    return state


def of_detectron2(state: State) -> State:
    """A backbone of mmdet's names under detectron2's."""
    found = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        parts = key.removeprefix("backbone.").split(".")
        if parts[0].startswith("layer"):
            parts[0] = f"res{int(parts[0][5:]) + 1}"
            parts = ".".join(parts).replace("downsample.0", "shortcut").split(".")
            parts = ".".join(parts).replace("downsample.1", "shortcut.norm").split(".")
            parts = [f"conv{p[2:]}.norm" if p.startswith("bn") else p for p in parts]
        else:
            parts = ["stem", "conv1", *(["norm"] if parts[0] == "bn1" else []), parts[1]]
        found["backbone.bottom_up." + ".".join(parts)] = value
    return found


def mmdet_fcos() -> State:
    state = resnet_of_mmdet()
    for i, width in enumerate((512, 1024, 2048)):
        state |= layer(f"neck.lateral_convs.{i}.conv", 256, width, 1, 1)
    for i in range(5):
        state |= layer(f"neck.fpn_convs.{i}.conv", 256, 256, 3, 3)
        state[f"bbox_head.scales.{i}.scale"] = torch.tensor(1.0 + 0.1 * i)
    for part in ("cls_convs", "reg_convs"):
        for i in range(4):
            state |= layer(f"bbox_head.{part}.{i}.conv", 256, 256, 3, 3, bias=False)
            state |= {f"bbox_head.{part}.{i}.gn.{k}": torch.rand(256) for k in ("weight", "bias")}
    for part, width in (("conv_cls", 5), ("conv_reg", 4), ("conv_centerness", 1)):
        state |= layer(f"bbox_head.{part}", width, 256, 3, 3)
    return state


def mmdet_two_stage(mask: bool) -> State:
    state = resnet_of_mmdet()
    for i, width in enumerate((256, 512, 1024, 2048)):
        state |= layer(f"neck.lateral_convs.{i}.conv", 256, width, 1, 1)
        state |= layer(f"neck.fpn_convs.{i}.conv", 256, 256, 3, 3)
        state |= layer(f"roi_head.bbox_head.shared_convs.{i}.conv", 256, 256, 3, 3)
        state |= layer(f"roi_head.mask_head.convs.{i}.conv", 256, 256, 3, 3) if mask else {}
    for part, width, size in (("rpn_conv", 256, 3), ("rpn_cls", 3, 1), ("rpn_reg", 12, 1)):
        state |= layer(f"rpn_head.{part}", width, 256, size, size)
    state |= layer("roi_head.bbox_head.shared_fcs.0", 1024, 12544)
    state |= layer("roi_head.bbox_head.fc_cls", 6, 1024) | layer("roi_head.bbox_head.fc_reg", 20, 1024)
    if mask:
        state |= layer("roi_head.mask_head.upsample", 256, 256, 2, 2) | layer(
            "roi_head.mask_head.conv_logits", 5, 256, 1, 1
        )
    return state


def mmdet_detr(new: bool) -> State:
    state = resnet_of_mmdet()
    root = "" if new else "bbox_head.transformer."
    state |= layer("neck.convs.0.conv" if new else "bbox_head.input_proj", 256, 2048, 1, 1)
    state["query_embedding.weight" if new else "bbox_head.query_embedding.weight"] = torch.randn(7, 256)
    for half, attentions in (("encoder", 1), ("decoder", 2)):
        for i in range(6):
            here = f"{root}{half}.layers.{i}"
            for k in range(attentions):
                place = ("self_attn", "cross_attn")[k] if new else f"attentions.{k}"
                state |= {f"{here}.{place}.attn.in_proj_weight": torch.randn(768, 256)}
                state |= {f"{here}.{place}.attn.in_proj_bias": torch.randn(768)}
                state |= layer(f"{here}.{place}.attn.out_proj", 256, 256)
            feed = f"{here}.ffn" if new else f"{here}.ffns.0"
            state |= layer(f"{feed}.layers.0.0", 2048, 256) | layer(f"{feed}.layers.1", 256, 2048)
            for k in range(attentions + 1):
                state |= {f"{here}.norms.{k}.{part}": torch.rand(256) for part in ("weight", "bias")}
    state |= {f"{root}decoder.post_norm.{part}": torch.rand(256) for part in ("weight", "bias")}
    state |= layer("bbox_head.reg_ffn.layers.0.0", 256, 256) | layer("bbox_head.reg_ffn.layers.1", 256, 256)
    return state | layer("bbox_head.fc_cls", 6, 256) | layer("bbox_head.fc_reg", 4, 256)


def detectron2_retinanet() -> State:
    state = of_detectron2(resnet_of_mmdet())
    for i, width in enumerate((512, 1024, 2048), 3):
        state |= layer(f"backbone.fpn_lateral{i}", 256, width, 1, 1) | layer(f"backbone.fpn_output{i}", 256, 256, 3, 3)
    state |= layer("backbone.top_block.p6", 256, 2048, 3, 3) | layer("backbone.top_block.p7", 256, 256, 3, 3)
    for part in ("cls_subnet", "bbox_subnet"):
        for i in range(4):
            state |= layer(f"head.{part}.{2 * i}", 256, 256, 3, 3)
    return state | layer("head.cls_score", 45, 256, 3, 3) | layer("head.bbox_pred", 36, 256, 3, 3)


def detectron2_mask_rcnn() -> State:
    state = of_detectron2(resnet_of_mmdet())
    for i, width in enumerate((256, 512, 1024, 2048), 2):
        state |= layer(f"backbone.fpn_lateral{i}", 256, width, 1, 1) | layer(f"backbone.fpn_output{i}", 256, 256, 3, 3)
        state |= layer(f"roi_heads.mask_head.mask_fcn{i - 1}", 256, 256, 3, 3)
    for part, width, size in (("conv", 256, 3), ("objectness_logits", 3, 1), ("anchor_deltas", 12, 1)):
        state |= layer(f"proposal_generator.rpn_head.{part}", width, 256, size, size)
    state |= layer("roi_heads.box_head.fc1", 1024, 12544) | layer("roi_heads.box_head.fc2", 1024, 1024)
    state |= layer("roi_heads.box_predictor.cls_score", 6, 1024) | layer("roi_heads.box_predictor.bbox_pred", 20, 1024)
    return (
        state
        | layer("roi_heads.mask_head.deconv", 256, 256, 2, 2)
        | layer("roi_heads.mask_head.predictor", 5, 256, 1, 1)
    )


def same(found: State, expected: State) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[key], value) for key, value in expected.items())


def body(state: State, x: Tensor, root: str, first: bool) -> list[Tensor]:
    """ResNet-50 from mmdet's names, written out; ``first``: the stride is in the first convolution of a block."""

    def step(x: Tensor, conv: str, bn: str, stride: int, padding: int) -> Tensor:
        x = F.conv2d(x, state[f"{root}{conv}.weight"], stride=stride, padding=padding)
        mean, var = state[f"{root}{bn}.running_mean"], state[f"{root}{bn}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{root}{bn}.weight"], state[f"{root}{bn}.bias"])

    x = F.max_pool2d(step(x, "conv1", "bn1", 2, 3).relu(), 3, 2, 1)
    found = []
    for stage, depth in enumerate((3, 4, 6, 3), 1):
        for block in range(depth):
            here, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = step(x, f"{here}.conv1", f"{here}.bn1", stride if first else 1, 0).relu()
            y = step(y, f"{here}.conv2", f"{here}.bn2", 1 if first else stride, 1).relu()
            y = step(y, f"{here}.conv3", f"{here}.bn3", 1, 0)
            x = (y + (step(x, f"{here}.downsample.0", f"{here}.downsample.1", stride, 0) if block == 0 else x)).relu()
        found.append(x)
    return found


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride=stride, padding=weight.shape[2] // 2)


def merged(laterals: list[Tensor]) -> list[Tensor]:
    for i in (1, 0):
        laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], size=laterals[i].shape[2:])
    return laterals


def calm(state: State) -> State:
    """Weights under which the features of fifty layers stay of moderate size."""
    for key, value in state.items():
        if ".bn3." in key or "conv3.norm" in key:
            value *= 0.2 if key.endswith(("weight", "bias")) else 1
        if "conv_reg" in key or "bbox_pred" in key:
            value *= 0.05 if "conv_reg" in key else 1e-3
    return state


def test_norms_of_the_pyramid_of_mmdets_fcos_come_and_go() -> None:
    state = mmdet_fcos()
    for conv_name in [key.removesuffix(".conv.weight") for key in state if key.startswith("neck.") and "weight" in key]:
        del state[f"{conv_name}.conv.bias"]
        state |= {
            f"{conv_name}.bn.{part}": torch.rand(256) for part in ("weight", "bias", "running_mean", "running_var")
        }
        state[f"{conv_name}.bn.num_batches_tracked"] = torch.tensor(7)
    detector = mmdet.from_state_dict("fcos_r50_caffe_fpn_gn-head_1x_coco", state)
    assert torch.equal(detector.neck.extra[1][1].running_var, state["neck.fpn_convs.4.bn.running_var"])  # type: ignore
    assert same(mmdet.to_state_dict(detector), state)


def test_mmdets_fcos_computes_what_its_formulas_say() -> None:
    torch.manual_seed(0)
    state = calm(mmdet_fcos())
    detector = mmdet.from_state_dict("fcos_r50_caffe_fpn_gn-head_1x_coco", state)
    assert isinstance(detector, FCOS) and same(mmdet.to_state_dict(detector), state)
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    pixels = image.flip(1).float() - torch.tensor([102.9801, 115.9465, 122.7717]).view(1, 3, 1, 1)  # BGR
    backbone = {key.removeprefix("backbone."): v for key, v in state.items() if key.startswith("backbone.")}
    c3, c4, c5 = body(backbone, pixels, "", first=True)[1:]
    laterals = merged([conv(state, f"neck.lateral_convs.{i}.conv", c) for i, c in enumerate((c3, c4, c5))])
    levels = [conv(state, f"neck.fpn_convs.{i}.conv", level) for i, level in enumerate(laterals)]
    levels.append(conv(state, "neck.fpn_convs.3.conv", levels[2], 2))
    levels.append(conv(state, "neck.fpn_convs.4.conv", levels[3].relu(), 2))
    scores, boxes, centres = [], [], []
    for i, level in enumerate(levels):
        towers = []
        for part in ("cls_convs", "reg_convs"):
            x = level
            for k in range(4):
                x = F.conv2d(x, state[f"bbox_head.{part}.{k}.conv.weight"], padding=1)
                names = [f"bbox_head.{part}.{k}.gn.{which}" for which in ("weight", "bias")]
                x = F.group_norm(x, 32, state[names[0]], state[names[1]]).relu()
            towers.append(x)
        scores.append(conv(state, "bbox_head.conv_cls", towers[0])[0].permute(1, 2, 0).reshape(-1, 5))
        centres.append(conv(state, "bbox_head.conv_centerness", towers[0])[0].flatten())
        sides = (conv(state, "bbox_head.conv_reg", towers[1]) * state[f"bbox_head.scales.{i}.scale"]).exp()
        for row in range(level.shape[2]):
            for column in range(level.shape[3]):
                x, y = (column + 0.5) * 8 * 2**i, (row + 0.5) * 8 * 2**i
                left, top, right, bottom = sides[0, :, row, column].tolist()
                boxes.append([x - left, y - top, x + right, y + bottom])
    size = torch.tensor([[64, 96]])
    with torch.no_grad():
        found = detector.candidates(detector.features(image, size), size)
    assert isinstance(found, FCOSCandidates) and found.scores is not None and found.boxes is not None
    assert found.centerness is not None
    expected = torch.cat(scores)
    assert (found.scores - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1)
    assert (found.centerness - torch.cat(centres)).abs().max() < 1e-4 * torch.cat(centres).abs().max().clamp(min=1)
    assert (found.boxes - torch.tensor(boxes)).abs().max() < 1e-2


def test_detectron2s_retinanet_computes_what_its_formulas_say() -> None:
    torch.manual_seed(0)
    state = calm(detectron2_retinanet())
    detector = detectron2.from_state_dict("retinanet_R_50_FPN_3x", state | {"pixel_mean": torch.zeros(3, 1, 1)})
    assert isinstance(detector, RetinaNet) and same(detectron2.to_state_dict(detector), state)
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    pixels = image.flip(1).float() - torch.tensor([103.53, 116.28, 123.675]).view(1, 3, 1, 1)  # BGR
    plain: State = {}
    for key, value in state.items():
        if key.startswith("backbone.bottom_up."):
            key = key.removeprefix("backbone.bottom_up.").replace("shortcut.norm", "downsample.1")
            key = key.replace("shortcut", "downsample.0").removeprefix("stem.").replace("conv1.norm", "bn1")
            key = key.replace("conv2.norm", "bn2").replace("conv3.norm", "bn3")
            plain[f"layer{int(key[3]) - 1}{key[4:]}" if key.startswith("res") else key] = value
    c3, c4, c5 = body(plain, pixels, "", first=True)[1:]
    laterals = merged([conv(state, f"backbone.fpn_lateral{i}", c) for i, c in ((3, c3), (4, c4), (5, c5))])
    levels = [conv(state, f"backbone.fpn_output{i + 3}", level) for i, level in enumerate(laterals)]
    levels.append(conv(state, "backbone.top_block.p6", c5, 2))
    levels.append(conv(state, "backbone.top_block.p7", levels[3].relu(), 2))
    scores, boxes = [], []
    for i, level in enumerate(levels):
        maps = []
        for part, last in (("cls_subnet", "cls_score"), ("bbox_subnet", "bbox_pred")):
            x = level
            for k in range(4):
                x = conv(state, f"head.{part}.{2 * k}", x).relu()
            maps.append(conv(state, f"head.{last}", x)[0])
        for row in range(level.shape[2]):
            for column in range(level.shape[3]):
                for size in range(3):  # sizes outside, ratios inside
                    for number, ratio in enumerate((0.5, 1.0, 2.0)):
                        a = size * 3 + number
                        scores.append(maps[0][5 * a : 5 * a + 5, row, column])
                        area = (4 * 8 * 2**i * 2 ** (size / 3)) ** 2
                        width = math.sqrt(area / ratio)
                        dx, dy, dw, dh = maps[1][4 * a : 4 * a + 4, row, column].tolist()
                        x, y = column * 8 * 2**i + dx * width, row * 8 * 2**i + dy * width * ratio
                        half = (math.exp(dw) * width / 2, math.exp(dh) * width * ratio / 2)
                        boxes.append([x - half[0], y - half[1], x + half[0], y + half[1]])
    size = torch.tensor([[64, 96]])
    with torch.no_grad():
        found = detector.candidates(detector.features(image, size), size)
    assert isinstance(found, RetinaNetCandidates) and found.scores is not None and found.deltas is not None
    decoded = detector.coder.decode(found.anchors, found.deltas)
    # Rows of a cell: ratios outside here, so row 3 r + s here is row 3 s + r there.
    order = torch.arange(len(boxes)).view(-1, 3, 3).transpose(1, 2).flatten()
    expected = torch.stack(scores)[order]
    assert (found.scores - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1)
    assert (decoded - torch.tensor(boxes)[order]).abs().max() < 1e-2


@pytest.mark.parametrize("kind", ["mask", "faster", "detr2", "detr3"])
def test_mmdets_names_come_and_go(kind: str) -> None:
    torch.manual_seed(0)
    if kind.startswith("detr"):
        state = mmdet_detr(kind == "detr3")
        detector = mmdet.from_state_dict("detr_r50_8xb2-150e_coco", state)
        assert same(mmdet.to_state_dict(detector, version=int(kind[-1])), state)
        return
    state = mmdet_two_stage(kind == "mask")
    detector = mmdet.from_state_dict(f"{kind}-rcnn_r50_fpn_1x_coco", state)
    assert same(mmdet.to_state_dict(detector), state)
    with pytest.raises(ValueError, match=r"no place for: rpn_head\.more \[2\]"):
        mmdet.from_state_dict(f"{kind}_rcnn_r50_fpn", state | {"rpn_head.more": torch.zeros(2)})


def test_detectron2s_mask_rcnn_comes_and_goes() -> None:
    torch.manual_seed(0)
    state = detectron2_mask_rcnn()
    detector = detectron2.from_state_dict("mask_rcnn_R_50_FPN_3x", state)
    assert same(detectron2.to_state_dict(detector), state)
    assert detector.pixel_std == (1.0, 1.0, 1.0)


def test_the_online_branch_of_aligndets_checkpoints_is_taken() -> None:
    torch.manual_seed(0)
    online = {key: value for key, value in mmdet_fcos().items() if "conv_cls" not in key}
    other = {key: torch.full_like(value, 9) for key, value in online.items()}
    extra = layer("bbox_head.conv_cls.projector.0", 256, 256)
    state = {f"backbone.{key}": value for key, value in (online | extra).items()}
    state |= {f"online_net.{key}": value for key, value in (online | extra).items()}
    state |= {f"momentum_net.{key}": value for key, value in other.items()}
    for given in (state, online, {key: v for key, v in state.items() if not key.startswith("backbone.")}):
        detector = mmdet.from_state_dict("fcos_r50_fpn", given, num_classes=20)
        back = mmdet.to_state_dict(detector)
        assert all(torch.equal(back[key], value) for key, value in online.items())
        assert len(back["bbox_head.conv_cls.bias"]) == 20
    broken = {key: value for key, value in online.items() if key != "neck.fpn_convs.0.conv.bias"}
    with pytest.raises(ValueError, match=r"neck\.output\.0\.bias \[256\]"):
        mmdet.from_state_dict("fcos_r50_fpn", broken)


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("backbone.bottom_up.stem.conv1.weight", (64, 4, 7, 7), r"stem\.conv1\.weight \[64, 4, 7, 7\] for"),
        ("backbone.bottom_up.stem.conv1.weight", (64, 1, 7, 7), r"stem\.conv1\.weight \[64, 1, 7, 7\] for"),
        ("head.bbox_pred.bias", (48,), r"head\.bbox_pred\.bias \[48\] for"),
        ("head.cls_score.bias", (46,), r"head\.cls_score\.bias: want a multiple of 9 anchors, got 46 scores"),
    ],
)
def test_tensors_of_another_number_are_not_cut_to_fit(key: str, shape: tuple[int, ...], words: str) -> None:
    """Anchors and channels are put in another order here, which takes no more of them than there should be."""
    state = detectron2_retinanet() | {key: torch.zeros(shape)}
    with pytest.raises(ValueError, match=words):
        detectron2.from_state_dict("retinanet_R_50_FPN_1x", state)


def test_convert_writes_what_predict_reads_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    state = detectron2_retinanet()
    torch.save({"model": state}, tmp_path / "peer.pth")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    first = ["--from", "detectron2", "--to", "aligndet", "--name", "retinanet_R_50_FPN_1x"]
    paths = [str(tmp_path / name) for name in ("peer.pth", "ours.pt", "back.pth")]
    assert main(["convert", *first, "--classes", str(tmp_path / "names.txt"), *paths[:2]]) == 0
    detector, classes = load_detector(paths[1])
    assert classes == ("a", "b", "c", "d", "e") and detector.pixel_std == (1.0, 1.0, 1.0)
    assert main(["convert", "--from", "aligndet", "--to", "detectron2", *paths[1:]]) == 0
    assert same(torch.load(paths[2])["model"], state)
    assert "for detectron2" in capsys.readouterr().out
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["convert", "--from", "aligndet", "--to", "detectron2", paths[1], str(tmp_path / "folder")])
    assert stopped.value.code == 2
    assert "folder: want a file to write, got a folder" in capsys.readouterr().err
    for arguments, message in (
        (["--from", "detectron2", "--to", "aligndet"], "--name: want"),
        (["--from", "aligndet", "--to", "detr"], "expected"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["convert", *arguments, *paths[1:]])
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and (message in lines[0] or "no counterpart" in lines[0])


def test_the_stride_may_stand_in_the_first_convolution_of_bottlenecks_only() -> None:
    with pytest.raises(ValueError, match="stride_in_1x1: want resnet50 or resnet101"):
        build_detector("fcos", "resnet18", stride_in_1x1=True)

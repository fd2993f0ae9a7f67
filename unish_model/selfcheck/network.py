"""Computes this network's outputs for the inputs of each golden file, and compares them with the released ones.

There is one check for each kind of file; it yields every output with its error and its gate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unish_model.network import geometry, released
from unish_model.network.alignnet import AlignNet, time_rotary
from unish_model.network.checkpoint import build_empty
from unish_model.network.config import UniSHConfig
from unish_model.network.human import HumanHead
from unish_model.network.layers import Rotary, frequencies, rotate
from unish_model.network.model import Prediction, UniSH, concatenate
from unish_model.network.preprocess import crop_people, resize_frames
from unish_model.network.scene import CameraHead, Scene
from unish_model.selfcheck.compare import (
    FLIP_GATE,
    FUNCTION_GATE,
    MOGE_GATE,
    MOGE_NORMAL_GATE,
    NETWORK_GATE,
    Arrays,
    Found,
    GoldenError,
    flips,
    load_arrays,
    relative_error,
    rotation_error,
    tensors,
)
from unish_model.selfcheck.weights import fill, input_array

# --- functions ------------------------------------------------------------------------------------------------------


def check_rope(arrays: Arrays, _: Context) -> Found:
    """Rotary tables and their use, along time and over a patch grid."""
    golden = tensors(arrays)
    for name, value in arrays.items():
        match = re.fullmatch(r"([a-z]+)(\d+d?)", name)
        if match is None:
            raise GoldenError(f"cannot read the case from the name of the rotary table {name!r}")
        kind, number = match.groups()
        if kind in ("cos", "sin"):
            length, width = value.shape
            table = getattr(time_rotary(torch.arange(length).float(), length, width, 100.0), kind)
            yield name, relative_error(table[:, 0].repeat(1, 2), value), NETWORK_GATE
        elif kind == "out":
            tokens, positions = golden["tok" + number], golden["pos" + number]
            width = tokens.shape[-1]
            if number == "2d":
                angles = positions[..., None].float() * frequencies(width // 4, 100.0)
                tables = Rotary(angles.cos(), angles.sin())
            else:
                tables = time_rotary(positions.float(), int(positions.max()) + 1, width, 100.0)
            ours = rotate(tokens, Rotary(*(table[:, None] for table in tables)))
            yield name, relative_error(ours, value), NETWORK_GATE


def check_rotations(arrays: Arrays, _: Context) -> Found:
    """Conversions between six numbers, matrices, quaternions and axis-angle: ours and the released ones."""
    golden = tensors(arrays)
    matrix = geometry.rotation_from_6d(golden["rot6d"])
    yield "rotmat", relative_error(matrix, arrays["rotmat"]), NETWORK_GATE
    yield "rot6d", relative_error(matrix[..., :2].mT.flatten(-2), arrays["rotmat_to_rot6d"]), NETWORK_GATE
    turned = geometry.rotation_from_axis_angle(golden["aa"])
    yield "aa_to_rotmat", relative_error(turned, arrays["aa_to_rotmat"]), NETWORK_GATE
    aa = geometry.axis_angle(golden["aa_to_rotmat"])
    yield "rotmat_to_aa_of_aa", rotation_error(aa, arrays["rotmat_to_aa_of_aa"]), NETWORK_GATE
    yield "rotmat_to_aa", rotation_error(geometry.axis_angle(golden["rotmat"]), arrays["rotmat_to_aa"]), NETWORK_GATE
    yield "rot6d_to_aa", rotation_error(geometry.axis_angle(matrix), arrays["rot6d_to_aa"]), NETWORK_GATE
    theirs = released.axis_angle(golden["rotmat"])
    yield "rotmat_to_aa (released)", relative_error(theirs, arrays["rotmat_to_aa"]), NETWORK_GATE
    quaternion = released.quaternion(golden["aa_to_rotmat"])
    yield "rotmat_to_quat (released)", relative_error(quaternion, arrays["rotmat_to_quat"]), NETWORK_GATE
    from_quaternion = geometry.rotation_from_quaternion(golden["aa_to_quat"])
    yield "aa_to_quat", relative_error(from_quaternion, turned.numpy()), NETWORK_GATE
    yield "quat_to_aa", rotation_error(geometry.axis_angle(from_quaternion), arrays["quat_to_aa"]), NETWORK_GATE


def check_svd(arrays: Arrays, _: Context) -> Found:
    """Nine numbers to the nearest rotation."""
    rows = nn.functional.normalize(torch.from_numpy(arrays["m9"]).unflatten(-1, (3, 3)), dim=-1)
    yield "R", relative_error(geometry.nearest_rotation(rows), arrays["R"]), NETWORK_GATE


def check_transform(arrays: Arrays, _: Context) -> Found:
    """A body from camera to world, by the released formula."""
    golden = tensors(arrays)
    c2w = geometry.inverse_se3(golden["w2c"])
    pose, translation = geometry.body_to_world(golden["pose_rotmat"], golden["trans_cam"], c2w)
    yield "se3_inverse", relative_error(c2w, arrays["se3_inverse"]), NETWORK_GATE
    yield "pose_world_rotmat", relative_error(pose, arrays["pose_world_rotmat"]), NETWORK_GATE
    yield "trans_world", relative_error(translation, arrays["trans_world"]), NETWORK_GATE
    matrices = geometry.rotation_from_axis_angle(golden["pose_aa"].unflatten(-1, (-1, 3)))
    for suffix, camera in (("", c2w), ("_ext2", c2w[:1, :1])):  # one camera for all frames
        pose, translation = geometry.body_to_world(matrices, golden["trans_cam"], camera)
        name = "pose_world_aa" + suffix
        if name in arrays:
            yield name, rotation_error(geometry.axis_angle(pose).flatten(-2), arrays[name]), NETWORK_GATE
        if suffix and "trans_world" + suffix in arrays:
            yield "trans_world" + suffix, relative_error(translation, arrays["trans_world" + suffix]), NETWORK_GATE


def check_focal_shift(arrays: Arrays, _: Context) -> Found:
    """Focal and shift where the released solver stops, with and without a mask, and with a given focal."""
    golden = tensors(arrays)
    for name, mask in (("nomask", None), ("mask", golden["mask"])):
        fit = geometry.recover_focal_shift(golden["points"], mask, guarded=False)
        yield f"focal_{name}", relative_error(fit.focal, arrays[f"focal_{name}"]), FUNCTION_GATE
        yield f"shift_{name}", relative_error(fit.shift, arrays[f"shift_{name}"]), FUNCTION_GATE
    given = golden["true_focal"].float()
    fit = geometry.recover_focal_shift(golden["points"], golden["mask"], focal=given, guarded=False)
    yield "shift_given_focal", relative_error(fit.shift, arrays["shift_given_focal"]), FUNCTION_GATE


def check_unprojection(arrays: Arrays, _: Context) -> Found:
    """Unprojection of depth with intrinsics given as fractions of the image."""
    golden = tensors(arrays)
    height, width = golden["depth"].shape[-2:]
    pixels = golden["K"] * torch.tensor([width, height, 1.0])[:, None]
    yield "points", relative_error(geometry.unproject(golden["depth"], pixels), arrays["points"]), NETWORK_GATE


def check_preprocess(arrays: Arrays, _: Context) -> Found:
    """Frame resizing and person crops."""
    for name in (name for name in arrays if name.startswith("frames_")):
        shape = name.removeprefix("frames_")
        golden = arrays[f"resized_{shape}"]
        resized = resize_frames(arrays[name], max(golden.shape[-2:]))
        yield f"resized_{shape}", relative_error(resized, golden), NETWORK_GATE
    boxes = torch.from_numpy(arrays["boxes"])
    crops, info = crop_people(torch.from_numpy(arrays["resized_land"])[None], boxes, box_scale=1.2)
    step = crops.shape[-1] // arrays["patches_stride4"].shape[-1]
    yield "patches", relative_error(crops[..., ::step, ::step], arrays["patches_stride4"]), NETWORK_GATE
    yield "bbox_info", relative_error(info, arrays["bbox_info"]), NETWORK_GATE
    yield "patch_sum", relative_error(crops.double().sum((-1, -2)), arrays["patch_sum"]), NETWORK_GATE


# --- single modules -------------------------------------------------------------------------------------------------


def check_alignnet(arrays: Arrays, context: Context) -> Found:
    """AlignNet on named random features, over lengths and frame rates."""
    config = context.config
    net = AlignNet(config).eval()
    fill(net, context.salt, "alignnet.")
    for case in sorted({name.rpartition("_")[0] for name in arrays}):
        match = re.fullmatch(r"B(\d+)_L(\d+)_T(\d+)_fps([\d.]+)", case)
        if match is None:
            raise GoldenError(f"cannot read the sizes from the name of AlignNet's case {case!r}")
        batch, frames, tokens = map(int, match.groups()[:3])
        width, body = config.scene.hidden, config.human.decoder.width
        hidden = input_array(context.salt, f"align/hidden/{batch}x{frames}x{tokens}", (batch, frames, tokens, width))
        cam = input_array(context.salt, f"align/cam/{batch}x{frames}", (batch, frames, 1, body))
        out = net(torch.from_numpy(hidden), torch.from_numpy(cam)[:, :, 0], float(match[4]))
        yield f"{case} scale", relative_error(out.scale[:, None], arrays[f"{case}_scale"]), NETWORK_GATE
        yield f"{case} trans", relative_error(out.translation, arrays[f"{case}_trans"]), NETWORK_GATE


def check_human_head(arrays: Arrays, context: Context) -> Found:
    """The SMPL decoder on named random crop features."""
    config = context.config.human
    head = HumanHead(config).eval()
    fill(head, context.salt, "human_head.")
    batch, frames = arrays["bbox"].shape[:2]
    rows, columns = config.grid
    shape = (batch, frames, config.backbone.width, rows, columns)
    features = torch.from_numpy(input_array(context.salt, "head/x", shape))
    out = head(features.flatten(0, 1).flatten(2).mT, torch.from_numpy(arrays["bbox"]))
    yield "pose_cam", relative_error(out.rotations.flatten(-3), arrays["pose_cam"]), NETWORK_GATE
    yield "token_out", relative_error(out.tokens, arrays["token_out"]), NETWORK_GATE
    yield "betas", relative_error(out.betas, arrays["betas"]), NETWORK_GATE


def check_camera_head(arrays: Arrays, context: Context) -> Found:
    """The camera head on named random tokens of a 4 x 6 grid."""
    width = context.config.scene.camera_width
    head = CameraHead(width).eval()
    fill(head, context.salt, "pi3.camera_head.")
    tokens = torch.from_numpy(input_array(context.salt, "cam/x", (len(arrays["pose"]), 24, width)))
    yield "pose", relative_error(head(tokens), arrays["pose"]), NETWORK_GATE


# --- whole networks -------------------------------------------------------------------------------------------------


def _images(arrays: Arrays) -> Tensor:
    images = torch.from_numpy(arrays["images_u8"]).float() / 255
    return images if images.ndim == 5 else images[None]


def _clip(arrays: Arrays) -> tuple[Tensor, Tensor, Tensor]:
    """Images, crops and boxes in pixels of a UniSH file, each with a batch dimension."""
    patches = torch.from_numpy(arrays["patches_u8"]).float() / 255
    box = torch.from_numpy(arrays["bbox_info"])
    return _images(arrays), patches[None] if patches.ndim == 4 else patches, box[None] if box.ndim == 2 else box


class Recorder(ExitStack):
    """Stores the inputs and outputs of named modules."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}
        for name, module in modules.items():
            handle = module.register_forward_hook(self._hook(name))
            self.callback(handle.remove)

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(_: nn.Module, inputs: tuple, output: Any) -> None:
            self.seen[name], self.seen[name + ".inputs"] = output, inputs

        return keep


def _thinned(full: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Every k-th entry of each dimension, to the shape of a golden array that stores fewer."""
    steps = (max(1, round(have / want)) for have, want in zip(full.shape, shape, strict=True))
    return full[tuple(slice(None, None, step) for step in steps)]


def _fields(prediction: Prediction) -> dict[str, Tensor]:
    """Our prediction under the released names."""
    return {
        "trans_world": prediction.trans_world,
        "trans_cam": prediction.trans_cam,
        "betas": prediction.betas,
        "world_points": prediction.world_points,
        "local_points": prediction.local_points,
        "point_conf": prediction.confidence,
        "c2ws": prediction.network_c2w,
        "c2ws_cano": prediction.c2w,
        "w2cs_cano": prediction.w2c,
        "scale": prediction.unit[:, :1],
        "intrinsics": prediction.intrinsics,
        "depth_map": prediction.depth,
        "point_map": prediction.point_map,
        "pose_cam": released.axis_angle(prediction.pose_cam).flatten(-2),
        "pose_world": released.axis_angle(prediction.pose_world).flatten(-2),
        "masks": prediction.mask,
    }


def check_unish(arrays: Arrays, context: Context) -> Found:
    """The whole released inference, with its intermediate values."""
    net = context.unish()
    pi3 = net.pi3
    with Recorder(
        pi3=pi3,
        enc=pi3.encoder,
        point_hidden=pi3.point_decoder,
        conf_hidden=pi3.conf_decoder,
        cam_hidden=pi3.camera_decoder,
        vit=net.backbone,
        head=net.human_head,
        align=net.alignnet,
    ) as recorder:
        images, patches, box = _clip(arrays)
        prediction = net.infer(images, patches, box, compat="released")
    seen = recorder.seen
    scene, human, align = seen["pi3"], seen["head"], seen["align"]
    hidden = scene.hidden.flatten(0, 1)
    rows, columns = net.config.human.grid
    vit = seen["vit"].mT.unflatten(-1, (rows, columns))
    inner = {
        "geo_point_conf_logits": scene.conf_logits[..., None],
        "geo_local_points": scene.local_points,
        "geo_c2ws": scene.c2ws,
        "geo_hidden": hidden,
        "vit_stride16": vit,
        "token_out": human.tokens,
        "head_pose_rotmat": human.rotations.flatten(-3),
        "head_betas": human.betas,
        "bbox_over_f": seen["head.inputs"][1],
        "align_scale": align.scale[:, None],
        "align_trans": align.translation,
        **{name: seen[name] for name in ("enc", "point_hidden", "conf_hidden", "cam_hidden")},
    }
    outputs = _fields(prediction)
    for name, golden in arrays.items():
        public = name.removeprefix("out_")
        if name in ("images_u8", "patches_u8", "bbox_info"):
            continue
        if name == "hidden_sub":
            yield name, relative_error(hidden[:, ::16, ::16], golden), NETWORK_GATE
        elif name == "vit_sum":
            terms = vit.double().flatten(1)
            yield name, relative_error(terms.sum(1), golden, float(terms.abs().sum(1).max())), NETWORK_GATE
        elif name.startswith("sum_"):
            full = outputs[name.removeprefix("sum_").removeprefix("out_")].double()
            size = float(full.abs().sum((2, 3)).max())
            gate = FLIP_GATE if name.endswith("masks") else NETWORK_GATE
            yield name, relative_error(full.sum((2, 3)), golden, size), gate
        elif name in inner:
            yield name, relative_error(_thinned(inner[name], golden.shape), golden), NETWORK_GATE
        elif public in ("pose_cam", "pose_world"):
            yield name, rotation_error(outputs[public], golden), NETWORK_GATE
        elif name.startswith("out_") and public in outputs:
            ours = outputs[public]
            if ours.shape != golden.shape and ours.ndim >= 4:
                ours = ours[:, :, 3::7, 3::7]
            if golden.dtype == bool:
                yield name, flips(ours, golden), FLIP_GATE
            else:
                yield name, relative_error(ours, golden), NETWORK_GATE
        else:
            yield f"{name}: unknown output", float("inf"), NETWORK_GATE


def check_right_root(arrays: Arrays, context: Context) -> Found:
    """The world pose without the released mistake, for the clip in the file with the same name ending."""
    images, patches, box = _clip(context.clip(arrays["pose_world_right"].shape[1]))
    prediction = context.unish().infer(images, patches, box, compat="released")
    pose, _ = geometry.body_to_world(prediction.pose_cam, prediction.trans_cam, prediction.c2w)
    ours = geometry.axis_angle(pose).flatten(-2)
    yield "pose_world_right", rotation_error(ours, arrays["pose_world_right"]), NETWORK_GATE


def check_forward(arrays: Arrays, context: Context) -> Found:
    """The raw network, with boxes as given, on the clip in the file with the same name ending."""
    net = context.unish()
    images, patches, box = _clip(context.clip(arrays["trans_cam"].shape[1]))
    out = net(images, patches, box, compat="released")
    ours = {
        "pose_world": out.world_rotations.flatten(-3),
        "trans_world": out.world_translation,
        "pose_cam": out.human.rotations.flatten(-3),
        "trans_cam": out.align.translation,
        "betas": out.human.betas,
        "scale": out.align.scale[:, None],
        "c2ws_cano": out.scene.first_camera_frame,
    }
    for name, golden in arrays.items():
        yield name, relative_error(ours[name], golden), NETWORK_GATE


def check_chunks(arrays: Arrays, context: Context) -> Found:
    """The released video driver: windows without overlap, concatenated."""
    net = context.unish()
    match = re.search(r"chunk(\d+)", context.path.stem)
    size = int(match[1]) if match else 30
    frames, *resolution = arrays["depth_map"].shape
    images, patches, box = _clip(context.clip(frames, tuple(resolution)))
    parts = [
        net.infer(*(part[:, start : start + size] for part in (images, patches, box)), compat="released")
        for start in range(0, images.shape[1], size)
    ]
    whole = concatenate(parts, compat="released")
    names = {
        "depth_map": "depth_map",
        "extrinsics": "w2cs_cano",
        "pred_intrinsics": "intrinsics",
        "depth_conf": "point_conf",
        "pred_trans_cam": "trans_cam",
        "pred_betas": "betas",
        "pred_trans_world": "trans_world",
    }
    ours = _fields(whole)
    for name, golden in arrays.items():
        if name.endswith("_aa"):
            pose = ours["pose_world" if "world" in name else "pose_cam"]
            yield name, rotation_error(pose[0], golden), NETWORK_GATE
        else:
            yield name, relative_error(ours[names[name]][0], golden), NETWORK_GATE


def check_pi3(arrays: Arrays, context: Context) -> Found:
    """Pi3 alone, with its own names and without a first frame."""
    net = context.pi3()
    with Recorder(enc=net.encoder) as recorder, torch.no_grad():
        out = net(_images(arrays))
    points = geometry.transform_points(out.c2ws[:, :, None, None], out.local_points)
    ours = {
        "out_points": points,
        "out_local_points": out.local_points,
        "out_conf": out.conf_logits[..., None],
        "out_camera_poses": out.c2ws,
        "enc": recorder.seen["enc"],
        "hidden": out.hidden.flatten(0, 1),
    }
    for name in (name for name in arrays if name != "images_u8"):
        golden = arrays[name]
        yield name, relative_error(_thinned(ours[name], golden.shape), golden), NETWORK_GATE


def check_moge(arrays: Arrays, context: Context) -> Found:
    """MoGe-2 as the `moge` package runs it: shows that our teacher is the released one."""
    try:
        net = context.moge()
    except ImportError:
        yield "nothing compared: install dlr-moge", float("inf"), MOGE_GATE
        return
    outputs: dict[tuple[str, str], dict[str, Tensor]] = {}
    modes: dict[str, dict[str, Any]] = {
        "infer": {},
        "inferfov": {"fov_x": 55.0},
        "infernomask": {"apply_mask": False, "force_projection": False},
    }
    for name, golden in arrays.items():
        match = re.fullmatch(r"(B\d+_\d+x\d+_n(\d+))_([a-z]+)_(\w+)", name)
        if match is None:
            raise GoldenError(f"cannot read the case from the name of MoGe's {name!r}")
        case, tokens, mode, output = match.groups()
        if mode == "image":
            continue
        if (case, mode) not in outputs:
            image = torch.from_numpy(arrays[f"{case}_image_u8"]).float() / 255
            with torch.no_grad():
                if mode == "fwd":
                    outputs[case, mode] = net.forward(image, num_tokens=int(tokens))
                else:
                    outputs[case, mode] = net.infer(image, num_tokens=int(tokens), use_fp16=False, **modes[mode])
        ours = outputs[case, mode][output]
        if golden.dtype == bool:
            yield name, flips(ours, golden), FLIP_GATE
        else:
            gate = MOGE_NORMAL_GATE if output == "normal" else MOGE_GATE
            yield name, relative_error(ours, golden), gate


# --- what checks need -------------------------------------------------------------------------------------------------


def moge_vitl_normal() -> dict[str, Any]:
    """The published configuration of MoGe-2 ViT-L with normals."""
    widths = [1024, 256, 128, 64, 32]
    common = {
        "dim_res_blocks": widths,
        "res_block_in_norm": "none",
        "res_block_hidden_norm": "none",
        "resamplers": ["conv_transpose", "conv_transpose", "conv_transpose", "bilinear"],
    }

    def head(channels: int) -> dict[str, Any]:
        last = [None, None, None, None, channels]
        return {"dim_in": widths, "dim_out": last, "num_res_blocks": [0, 1, 1, 1, 0], **common}

    return {
        "encoder": {"backbone": "dinov2_vitl14", "intermediate_layers": [5, 11, 17, 23], "dim_out": 1024},
        "neck": {"dim_in": [1026, 2, 2, 2, 2], "dim_out": None, "num_res_blocks": [0, 2, 2, 2, 0], **common},
        "points_head": head(3),
        "normal_head": head(3),
        "mask_head": head(1),
        "scale_head": {"dims": [1024, 1024, 1024, 1]},
        "remap_output": "exp",
        "num_tokens_range": [1200, 3600],
    }


class Context:
    """What a check may need besides its own file. Holds one large network at a time."""

    def __init__(self, folder: Path, salt: str, config: UniSHConfig) -> None:
        self.folder = folder
        self.salt = salt
        self.config = config
        self.path = folder
        self._held: tuple[str, nn.Module] | None = None

    def _hold(self, name: str, build: Callable[[], nn.Module]) -> Any:
        if self._held is None or self._held[0] != name:
            self._held = None  # free the memory before the next network needs it
            module = build().eval()
            fill(module, self.salt)
            self._held = name, module
        return self._held[1]

    def unish(self) -> UniSH:
        """The whole network, with this salt's weights."""
        return self._hold("unish", lambda: build_empty(lambda: UniSH(self.config)).to_empty(device="cpu"))

    def pi3(self) -> Scene:
        """Pi3, with its own names."""
        return self._hold("pi3", lambda: build_empty(lambda: Scene(self.config.scene)).to_empty(device="cpu"))

    def moge(self) -> Any:
        """The `moge` package's network: with the configuration in the folder or its parent, or as published.

        Raises ImportError if the package is missing.
        """
        from moge.model.v2 import MoGeModel

        name = "moge2_vitl_normal_config.json"
        places = [path for path in (self.folder / name, self.folder.resolve().parent / name) if path.exists()]
        options = json.loads(places[0].read_text()) if places else moge_vitl_normal()
        return self._hold("moge", lambda: MoGeModel(**options))

    def clip(self, frames: int, size: tuple[int, int] | None = None) -> Arrays:
        """The UniSH file with the inputs of the current one: these frames, this size; same name ending preferred."""
        ending = self.path.stem.partition("_")[2]
        paths = self.folder.glob("unish_*.npz")
        for path in sorted(paths, key=lambda path: (not ending.startswith(path.stem.partition("_")[2]), path)):
            arrays = load_arrays(path)
            if "patches_u8" not in arrays:
                continue
            shape = arrays["images_u8"].shape
            if shape[-4] == frames and size in (None, shape[-2:]):
                return arrays
        raise GoldenError(f"{self.path.name} needs a unish_*.npz with {frames} frames in {self.folder}")

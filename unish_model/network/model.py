"""The UniSH network: `forward` for training, `infer` for inference; each returns one dataclass.

Cameras look along +z with x right and y down; the world is the first frame's camera. `compat="released"` repeats the
public inference, mistakes included; the default corrects it. Nothing here reads files, stitches windows or draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn
from torch.nn import functional as F

from unish_model.network import released
from unish_model.network.alignnet import AlignNet, AlignOutput
from unish_model.network.body import Body
from unish_model.network.config import Compat, UniSHConfig
from unish_model.network.geometry import (
    FocalShift,
    body_to_world,
    half_diagonal,
    intrinsics_matrix,
    inverse_se3,
    recover_focal_shift,
    rotation_from_axis_angle,
    scale_translation,
    transform_points,
    unproject,
)
from unish_model.network.human import HumanBackbone, HumanHead, HumanOutput, run_human
from unish_model.network.layers import Branch
from unish_model.network.scene import Scene, SceneOutput


@dataclass(frozen=True)
class NetworkOutput:
    """The result of `UniSH.forward`: the raw outputs that training uses, in the scene branch's unit of length."""

    scene: SceneOutput
    human: HumanOutput
    align: AlignOutput
    world_rotations: Float32[Tensor, "B S J 3 3"]
    """Joint rotations with the root in the first frame's camera."""
    world_translation: Float32[Tensor, "B S 3"]
    """SMPL translation in the first frame's camera."""


@dataclass(frozen=True)
class Prediction:
    """The predictions for clips, in metres.

    By default `focal`, `intrinsics` and everything derived from them have one value per clip; with `compat="released"`
    they have one per frame, and `local_points`, `world_points` and `trans_world` lack the depth shift.
    """

    local_points: Float32[Tensor, "B S H W 3"]
    """m, each frame's camera: the network's points, with the depth shift."""
    world_points: Float32[Tensor, "B S H W 3"]
    """m, the same points in the first frame's camera."""
    point_map: Float32[Tensor, "B S H W 3"]
    """m, each frame's camera: `depth` along the rays of `intrinsics`."""
    depth: Float32[Tensor, "B S H W"]
    """m along the optical axis."""
    confidence: Float32[Tensor, "B S H W"]
    """In [0, 1]."""
    mask: Bool[Tensor, "B S H W"]
    """Confident and in front of the camera."""
    c2w: Float32[Tensor, "B S 4 4"]
    """Camera to the first frame's camera, translation in m."""
    network_c2w: Float32[Tensor, "B S 4 4"]
    """Camera to the scene branch's own world, translation in m."""
    intrinsics: Float32[Tensor, "B S 3 3"]
    """In pixels of the input images."""
    focal_shift: FocalShift
    """(B, S): focal in half diagonals, shift in m, and whether the frame's points determine them."""
    pose_cam: Float32[Tensor, "B S J 3 3"]
    """SMPL joint rotations, root in each frame's camera."""
    pose_world: Float32[Tensor, "B S J 3 3"]
    """The same, root in the first frame's camera."""
    betas: Float32[Tensor, "B S betas"]
    """SMPL shape, the same in all frames of a clip."""
    frame_betas: Float32[Tensor, "B S betas"]
    """SMPL shape estimated from each frame."""
    trans_cam: Float32[Tensor, "B S 3"]
    """m, SMPL translation in each frame's camera."""
    trans_world: Float32[Tensor, "B S 3"]
    """m, SMPL translation in the first frame's camera."""
    scale: Float32[Tensor, "B S"]
    """m, AlignNet's mean distance of the valid points, the same in all frames of a clip."""
    unit: Float32[Tensor, "B S"]
    """m per unit of the scene branch, the same in all frames of a clip."""

    @property
    def w2c(self) -> Float32[Tensor, "B S 4 4"]:
        """First frame's camera to each camera."""
        return inverse_se3(self.c2w)


class UniSH(nn.Module):
    """Scene branch, human branch and AlignNet, with the released parameter names."""

    def __init__(self, config: UniSHConfig | None = None) -> None:
        super().__init__()
        self.config = config or UniSHConfig.released()
        self.pi3 = Scene(self.config.scene)
        self.backbone = HumanBackbone(self.config.human)
        self.human_head = HumanHead(self.config.human)
        self.alignnet = AlignNet(self.config)

    # --- switches ---------------------------------------------------------------------------------------------------

    def checkpoint_activations(self, *, scene: bool = False, human: bool = False, align: bool = False) -> None:
        """Recompute the activations of the chosen branches' blocks in the backward pass; store those of the others."""
        groups = ((scene, (self.pi3,)), (human, (self.backbone, self.human_head)), (align, (self.alignnet,)))
        for active, parts in groups:
            for part in parts:
                for module in part.modules():
                    if isinstance(module, Branch):
                        module.checkpointing = active

    def float32_parts(self) -> tuple[nn.Module, ...]:
        """The parts that always compute in float32: the scene's heads, the SMPL decoder and AlignNet."""
        return *self.pi3.float32_parts(), self.human_head, self.alignnet

    def trunk_names(self) -> frozenset[str]:
        """Names of the parameters outside `float32_parts`."""
        exact = {id(parameter) for part in self.float32_parts() for parameter in part.parameters()}
        return frozenset(name for name, parameter in self.named_parameters() if id(parameter) not in exact)

    def cast_trunks(self, dtype: torch.dtype, *, released_rounding: bool = False) -> UniSH:
        """Store the large transformers' weights in `dtype`; buffers and `float32_parts` stay float32.

        released_rounding: also round the weights of the float32 parts to `dtype`, as the released loader does.
        """
        trunk = self.trunk_names()
        for name, parameter in self.named_parameters():
            if name in trunk:
                parameter.data = parameter.data.to(dtype)
            elif released_rounding:
                parameter.data = parameter.data.to(dtype).float()
        return self

    # --- training ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        images: Float[Tensor, "B S 3 H W"],
        patches: Float[Tensor, "B S 3 256 256"],
        bbox_info: Float[Tensor, "B S 3"],
        fps: float = 6.0,
        compat: Compat = "default",
    ) -> NetworkOutput:
        """The raw network: no focal recovery, scaling or shift, and no synchronisation with the device.

        images: RGB in [0, 1], H and W multiples of 14. patches: person crops.
        bbox_info: crop centre from the image centre and crop side, in pixels over the focal length.
        """
        scene = self.pi3(images, round_angles=compat == "released")
        human = run_human(self.backbone, self.human_head, self.config.human, patches, bbox_info)
        align = self.alignnet(scene.hidden, human.tokens, fps)
        rotations, translation = _to_world(human.rotations, align.translation, scene.first_camera_frame, compat)
        return NetworkOutput(scene, human, align, rotations, translation)

    # --- use --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def infer(
        self,
        images: Float[Tensor, "B S 3 H W"],
        patches: Float[Tensor, "B S 3 256 256"],
        bbox_info: Float[Tensor, "B S 3"],
        *,
        fps: float = 6.0,
        intrinsics: Float[Tensor, " B #S 3 3"] | None = None,
        body: Body | None = None,
        compat: Compat = "default",
        confidence: float = 0.1,
        frame_step: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> Prediction:
        """Predict a clip in metres: first the scene, then its camera, the bodies seen by it, and the metric scale.

        images: RGB in [0, 1], H and W multiples of 14.
        patches: person crops in [0, 1]; bbox_info: crop centre from the image centre and
            crop side, in pixels of `images`.
        fps: of the given frames; the network was trained at 6.
        intrinsics: in pixels of `images`, used everywhere; estimated if not given.
        body: an SMPL body, for the exact rotation about its pelvis in `trans_world`; without it `trans_world` is
            R t + T, off by (R - 1) J0. The released mode ignores it.
        confidence: points with less confidence affect neither the scale nor the focal length.
        frame_step: frames per step in the per-frame parts: the same result with less memory.
        autocast: compute type of the transformers if the weights are float32.
        Raises ValueError for wrong shapes, in training mode, and for intrinsics with `compat="released"`, because the
        released inference ignores them.
        """
        if self.training:
            raise ValueError("the network is in training mode, which applies random dropout: call eval() first")
        if compat == "released" and intrinsics is not None:
            raise ValueError("the released inference cannot use given intrinsics; leave compat at its default")
        device = images.device
        if intrinsics is not None:
            intrinsics = intrinsics.to(device, torch.float32).expand(*images.shape[:2], 3, 3).clone()
        typed = torch.autocast(device.type, autocast) if autocast is not None else nullcontext()
        height, width = images.shape[-2:]
        with typed:
            scene = self.pi3(images, round_angles=compat == "released", frame_step=frame_step)
        conf = scene.conf_logits.sigmoid()
        mask = conf > confidence
        used = mask
        if compat != "released":  # a clip without any confident point still needs a scale
            used = mask | ~mask.any(3).any(2).any(1)[:, None, None, None]
        fit = _fit_camera(scene.local_points, used, intrinsics, compat)
        cameras = intrinsics_matrix(fit.focal * half_diagonal(height, width), height, width)
        if intrinsics is not None:
            cameras = intrinsics
        rays = _box_rays(bbox_info, cameras, height, width)
        with typed:
            human = run_human(self.backbone, self.human_head, self.config.human, patches, rays, frame_step)
            align = self.alignnet(scene.hidden, human.tokens, fps)

        distance = (scene.local_points.norm(dim=-1) * used).sum((1, 2, 3)) / (used.sum((1, 2, 3)) + 1e-8)
        unit = align.scale / distance
        frames = images.shape[1]
        local = scene.local_points * unit[:, None, None, None, None]
        per_frame = unit[:, None].repeat(1, frames)
        c2w = scale_translation(scene.first_camera_frame, per_frame)
        trans_cam = align.translation * unit[:, None, None]
        betas = human.betas[:, None].repeat(1, frames, 1)
        if compat == "released":
            fit = _fit_camera(local, mask, None, compat)
            cameras = intrinsics_matrix(fit.focal * half_diagonal(height, width), height, width)
        else:
            fit = dataclasses.replace(fit, shift=fit.shift * per_frame)
        depth = local[..., 2] + fit.shift[..., None, None]
        forward = F.pad(fit.shift[..., None], (2, 0))
        if compat == "released":  # its points and world translation do not get the shift
            rotations, trans_world = _to_world(human.rotations, trans_cam, c2w, compat)
            trans_cam = trans_cam + forward
        else:
            local, trans_cam = local + forward[:, :, None, None], trans_cam + forward
            pelvis = body.pelvis(betas) if body is not None else None
            rotations, trans_world = body_to_world(human.rotations, trans_cam, c2w, pelvis)
        return Prediction(
            local_points=local,
            world_points=transform_points(c2w[:, :, None, None], local),
            point_map=unproject(depth, cameras),
            depth=depth,
            confidence=conf,
            mask=mask & (depth > 0),
            c2w=c2w,
            network_c2w=scale_translation(scene.c2ws, per_frame),
            intrinsics=cameras,
            focal_shift=fit,
            pose_cam=human.rotations,
            pose_world=rotations,
            betas=betas,
            frame_betas=human.frame_betas,
            trans_cam=trans_cam,
            trans_world=trans_world,
            scale=align.scale[:, None].repeat(1, frames),
            unit=per_frame,
        )


def _to_world(rotations: Tensor, translation: Tensor, c2w: Tensor, compat: Compat) -> tuple[Tensor, Tensor]:
    """A body in the first frame's camera, in the released mode with the released mistake in the root rotation."""
    right, moved = body_to_world(rotations, translation, c2w)
    return (released.mistaken_root(rotations, c2w), moved) if compat == "released" else (right, moved)


def _box_rays(bbox_info: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """(B, S, 3) boxes in pixels from the image centre, to boxes from the principal point over the focal length."""
    centre = intrinsics.new_tensor((width / 2, height / 2)) - intrinsics[..., :2, 2]
    focal = (intrinsics[..., 0, 0] + intrinsics[..., 1, 1]) / 2
    return (bbox_info.float() + F.pad(centre, (0, 1))) / focal[..., None]


def _fit_camera(points: Tensor, mask: Tensor, intrinsics: Tensor | None, compat: Compat) -> FocalShift:
    """Focal and shift of every frame (B, S); by default one positive focal per clip, or the given intrinsics."""
    if compat == "released":
        return recover_focal_shift(points, mask, guarded=False)
    if intrinsics is not None:
        return recover_focal_shift(points, mask, intrinsics=intrinsics)
    free = recover_focal_shift(points, mask)
    told = torch.where(free.valid, free.focal, float("nan"))
    focal = told.nanmedian(1, keepdim=True).values.nan_to_num(1.0).expand_as(free.focal)
    fitted = recover_focal_shift(points, mask, focal=focal)
    return FocalShift(focal.clone(), fitted.shift, free.valid)


def concatenate(parts: Sequence[Prediction], body: Body | None = None, compat: Compat = "default") -> Prediction:
    """Concatenate windows of one video along time. Each stays in the world of its own first camera: no stitching.

    By default the body shape becomes the mean over all frames of the video. The body's world pose is computed again
    from the cameras; the released mode uses the formulas of the released video driver, which convert to axis-angle.
    """

    def join(values: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(values), 1)

    fields = {
        field.name: join([getattr(part, field.name) for part in parts])
        for field in dataclasses.fields(Prediction)
        if field.name != "focal_shift"
    }
    names = ("focal", "shift", "valid")
    fit = FocalShift(*(join([getattr(part.focal_shift, name) for part in parts]) for name in names))
    whole = Prediction(**fields, focal_shift=fit)
    pose, betas, pelvis = whole.pose_cam, whole.betas, None
    if compat == "released":
        pose = rotation_from_axis_angle(released.axis_angle(pose))
    else:
        betas = whole.frame_betas.mean(1, keepdim=True).repeat(1, betas.shape[1], 1)
        pelvis = body.pelvis(betas) if body is not None else None
    rotations, translation = body_to_world(pose, whole.trans_cam, whole.c2w, pelvis)
    return dataclasses.replace(whole, betas=betas, pose_world=rotations, trans_world=translation)

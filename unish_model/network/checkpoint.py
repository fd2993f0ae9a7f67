"""Reads and writes checkpoints. UniSH, Pi3 and CameraHMR load strictly; each foreign one has one name translation.

Only tensors are read: safetensors, or PyTorch files with the weights-only reader. Both are memory-mapped, into a
network that is built without memory. Nothing here trains, infers, or guesses names.
"""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from curation.files import atomic_path
from unish_model.network.config import UniSHConfig
from unish_model.network.human import Human
from unish_model.network.model import UniSH
from unish_model.network.scene import Scene

HUB_FILES = {
    "Murphyyyy/UniSH": "checkpoints/unish_release.safetensors",
    "yyfz233/Pi3": "model.safetensors",
}
"""The weights file in each public repository; any other repository needs `owner/name:file`."""

CAMERAHMR_IGNORED = (
    "smpl_head.deccam.",  # weak-perspective camera: UniSH has AlignNet instead
    "smpl_head.deckp.",  # dense key points: training only
    "smpl.",  # body models and discriminators, which were part of the training module
    "smpl_gt.",
    "smpl_layer.",
    "discriminator.",
)
"""Name prefixes of the CameraHMR tensors that UniSH does not use."""

SLICE = 64
"""Tensors converted before a file is opened again, which frees the pages read so far."""

Network = TypeVar("Network", bound=nn.Module)


class CheckpointError(Exception):
    """A checkpoint cannot be found or read, or does not fit; the message says what to do."""


class FetchError(CheckpointError):
    """A checkpoint with a valid remote name could not be downloaded."""


class NamesError(CheckpointError):
    """Names or shapes do not match; the lists name them."""

    def __init__(self, what: str, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
        self.missing, self.unexpected, self.misshapen = missing, unexpected, misshapen
        lines = [f"{what} does not fit the network; nothing was loaded."]
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                lines.append(f"  {len(names)} {kind}: {', '.join(names[:8])}{more}")
        lines.append("  Check that the file and the configuration belong together: `unish info` shows what it fits.")
        super().__init__("\n".join(lines))


# --- finding and reading --------------------------------------------------------------------------------------------


def resolve(source: str | Path) -> Path:
    """A local file, or a Hugging Face id (`owner/name` if in HUB_FILES, else `owner/name:file`), downloaded once.

    Raises CheckpointError, and FetchError if the download fails.
    """
    path = Path(source)
    if path.is_file():
        return path
    repository, _, file = str(source).partition(":")
    weights = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
    local = repository.startswith((".", "/", "~")) or repository.endswith(weights)
    looks_like_id = repository.count("/") == 1 and not local
    if not looks_like_id:
        raise CheckpointError(f"no checkpoint at {source}: give a file, or a Hugging Face id as owner/name:file")
    file = file or HUB_FILES.get(repository, "")
    if not file:
        raise CheckpointError(f"no file of {repository} is named: give {repository}:path/in/the/repository")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(repository, file))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise CheckpointError(f"there is no public repository {repository} at Hugging Face ({error})") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FetchError(
            f"could not download {file} of {repository} ({error}): download it by hand and give its path"
        ) from error


class _Inert:
    """Replaces every class in a PyTorch file that is unrelated to tensors; constructing it has no side effects.

    The result is a plain ordered dictionary, because the weights-only reader fills no other mapping.
    """

    def __new__(cls, *_: object, **__: object) -> OrderedDict:  # type: ignore[misc]
        return OrderedDict()


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a checkpoint file: names and shapes are loaded, values are mapped on demand."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors on the CPU that share the file's pages; writing to them never changes the file."""
        if self.path.suffix == ".safetensors":
            with safe_open(self.path, framework="pt") as archive:
                for name in names:
                    yield name, archive.get_tensor(name)
        else:
            tensors = _torch_tensors(self.path)
            for name in names:
                yield name, tensors[name]


def _torch_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of a PyTorch file, plain or under `state_dict` (Lightning) or `model` (MoGe)."""
    try:
        strangers = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in strangers]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to run the code in the file
        raise CheckpointError(f"{path} holds more than tensors and plain data: convert it to .safetensors") from error
    except (RuntimeError, ValueError, TypeError, EOFError, OSError) as error:
        raise CheckpointError(f"cannot read {path} as a PyTorch checkpoint ({error}): download it again") from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} contains no state dict")
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}


def open_tensors(path: Path) -> TensorFile:
    """Open a checkpoint without reading its values. Raises CheckpointError."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as archive:
                slices = {name: archive.get_slice(name) for name in archive.keys()}  # noqa: SIM118 not a mapping
                shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
                return TensorFile(path, shapes, dtypes, dict(archive.metadata() or {}))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {path} as a safetensors file ({error}): download it again") from error
    tensors = _torch_tensors(path)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}
    return TensorFile(path, shapes, dtypes, {})


# --- translations ---------------------------------------------------------------------------------------------------

Translation = Callable[[str], str | None]
"""A foreign name to ours, or None for a tensor on the list of ignored ones."""


def unchanged(name: str) -> str | None:
    """UniSH's names are ours; Pi3's are those of the scene branch, which is `pi3.` in UniSH."""
    return name


def from_camerahmr(name: str, ignored: tuple[str, ...] = CAMERAHMR_IGNORED) -> str | None:
    """CameraHMR's backbone keeps its name; its `smpl_head` is our `human_head`."""
    if name.startswith(ignored):
        return None
    return name.replace("smpl_head.", "human_head.", 1) if name.startswith("smpl_head.") else name


# --- strict loading -------------------------------------------------------------------------------------------------


def build_empty(build: Callable[[], Network]) -> Network:
    """A network whose tensors use no memory: they are on the meta device."""
    with torch.device("meta"):
        return build()


def load_into(
    network: Network,
    file: TensorFile,
    translate: Translation = unchanged,
    *,
    device: torch.device | str = "cpu",
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Network:
    """Replace every tensor of `network` by the file's: all or none.

    On the CPU, in the file's own types, the network shares the mapped file and nothing is copied; otherwise tensors are
    converted a few at a time. dtypes: types that differ from the file's, by our names. Raises NamesError.
    """
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    sources = {ours: name for name in file.shapes if (ours := translate(name)) is not None}
    misshapen = [
        f"{ours} {file.shapes[name]} instead of {expected[ours]}"
        for ours, name in sources.items()
        if ours in expected and file.shapes[name] != expected[ours]
    ]
    missing, unexpected = sorted(expected.keys() - sources.keys()), sorted(sources.keys() - expected.keys())
    if missing or unexpected or misshapen:
        raise NamesError(str(file.path), missing, [sources[name] for name in unexpected], misshapen)
    names = list(sources)
    target = torch.device(device)
    copied = target.type != "cpu" or bool(dtypes)
    kinds = dtypes or {}
    step = SLICE if copied else len(names)
    for start in range(0, len(names), step):
        part = {sources[name]: name for name in names[start : start + step]}
        state = {
            # copy even if nothing changes: one shared tensor would keep the whole file mapped
            part[foreign]: value.to(target, kinds.get(part[foreign]), copy=True) if copied else value
            for foreign, value in file.read(part)
        }
        network.load_state_dict(state, strict=False, assign=True)
    return network


def load_unish(
    source: str | Path,
    config: UniSHConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    trunk_dtype: torch.dtype | None = None,
) -> UniSH:
    """UniSH from a checkpoint, in evaluation mode.

    source: file or Hugging Face id. config: default is the one stored in the file, or else the released one.
    trunk_dtype: store the large transformers' weights in this type (see `UniSH.cast_trunks`).
    Raises CheckpointError, and NamesError for names or shapes that do not match.
    """
    file = open_tensors(resolve(source))
    chosen = config or stored_config(file) or UniSHConfig.released()
    network = build_empty(lambda: UniSH(chosen))
    dtypes = dict.fromkeys(network.trunk_names(), trunk_dtype) if trunk_dtype is not None else None
    return load_into(network, file, device=device, dtypes=dtypes).eval()


def load_pi3(source: str | Path, config: UniSHConfig | None = None, *, device: torch.device | str = "cpu") -> Scene:
    """The scene branch alone from a public Pi3 checkpoint, in evaluation mode. Raises CheckpointError."""
    chosen = config or UniSHConfig.released()
    return load_into(build_empty(lambda: Scene(chosen.scene)), open_tensors(resolve(source)), device=device).eval()


def load_camerahmr(
    source: str | Path,
    config: UniSHConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    ignored: tuple[str, ...] = CAMERAHMR_IGNORED,
) -> Human:
    """The human branch alone from a public CameraHMR checkpoint, in evaluation mode. Raises CheckpointError."""
    chosen = config or UniSHConfig.released()
    file = open_tensors(resolve(source))
    human = build_empty(lambda: Human(chosen.human))
    return load_into(human, file, lambda name: from_camerahmr(name, ignored), device=device).eval()


# --- writing --------------------------------------------------------------------------------------------------------


def stored_config(file: TensorFile) -> UniSHConfig | None:
    """The configuration that `save_unish` stored in the file, if any. Raises CheckpointError if it is unreadable."""
    text = file.metadata.get("unish_config")
    if text is None:
        return None
    try:
        return UniSHConfig.from_dict(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"this version cannot read the configuration in {file.path}: {error!r}") from error


def check_target(path: Path) -> None:
    """Raise CheckpointError unless `save_unish` can write a file of this name."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"the name of a checkpoint must end in .safetensors: {path.name}")


def save_unish(network: UniSH, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a checkpoint with its configuration, atomically. Raises CheckpointError for another suffix."""
    check_target(path)
    state = {name: value.detach().contiguous() for name, value in network.state_dict().items()}
    notes = {"format": "pt", "unish_config": json.dumps(network.config.to_dict()), **(metadata or {})}
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata=notes)


def compose(
    pi3: str | Path,
    camerahmr: str | Path,
    config: UniSHConfig | None = None,
    *,
    seed: int = 42,
    ignored: tuple[str, ...] = CAMERAHMR_IGNORED,
) -> UniSH:
    """A starting point for training: Pi3 and CameraHMR unchanged, AlignNet initialised from `seed`.

    AlignNet's copies of the mean body are CameraHMR's, as in the release. Raises CheckpointError.
    """
    chosen = config or UniSHConfig.released()
    network = build_empty(lambda: UniSH(chosen))
    scene, human = load_pi3(pi3, chosen), load_camerahmr(camerahmr, chosen, ignored=ignored)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.alignnet = type(network.alignnet)(chosen)
    network.pi3, network.backbone, network.human_head = scene, human.backbone, human.human_head
    for name in ("init_body_pose", "init_betas", "init_cam"):
        getattr(network.alignnet, name).copy_(getattr(human.human_head, name))
    return network.eval()


# --- describing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """A description of a checkpoint file."""

    kind: str
    """UniSH, Pi3, CameraHMR, MoGe-2 or unknown."""
    tensors: int
    parameters: int
    """Numbers in all tensors, buffers included."""
    dtypes: tuple[str, ...]
    parts: dict[str, tuple[int, int]]
    """First part of the names, to counts of tensors and numbers."""
    fits: str
    """The configuration with these names and shapes, or a sentence that there is none."""


def summarise(file: TensorFile) -> Summary:
    """Describe a checkpoint by its names and shapes alone."""
    sizes = {name: int(torch.Size(shape).numel()) for name, shape in file.shapes.items()}
    heads = ("unish", "alignnet."), ("camerahmr", "smpl_head."), ("moge", "points_head."), ("pi3", "point_decoder.")
    kind = next((kind for kind, prefix in heads if any(name.startswith(prefix) for name in sizes)), "unknown")
    parts: dict[str, tuple[int, int]] = {}
    for name, size in sizes.items():
        part = name.partition(".")[0]
        count, total = parts.get(part, (0, 0))
        parts[part] = count + 1, total + size
    titles = {"unish": "UniSH", "pi3": "Pi3", "camerahmr": "CameraHMR", "moge": "MoGe-2"}
    return Summary(
        kind=titles.get(kind, "unknown"),
        tensors=len(sizes),
        parameters=sum(sizes.values()),
        dtypes=tuple(sorted(set(file.dtypes.values()))),
        parts=parts,
        fits=_fitting(kind, file),
    )


def _fitting(kind: str, file: TensorFile) -> str:
    """The preset a file fits, by names and shapes."""
    builders: dict[str, tuple[Callable[[UniSHConfig], nn.Module], Translation]] = {
        "unish": (UniSH, unchanged),
        "pi3": (lambda config: Scene(config.scene), unchanged),
        "camerahmr": (lambda config: Human(config.human), from_camerahmr),
    }
    if kind not in builders:
        return "not a part of UniSH"
    build, translate = builders[kind]
    found = {ours: shape for name, shape in file.shapes.items() if (ours := translate(name)) is not None}
    stored = stored_config(file)
    candidates = {"its stored configuration": stored} if stored else {}
    candidates |= {name: UniSHConfig.named(name) for name in ("released", "paper", "tiny")}
    for name, config in candidates.items():
        network = build_empty(partial(build, config))
        if {key: tuple(value.shape) for key, value in network.state_dict().items()} == found:
            return name
    return "no known configuration"

"""How fast the network predicts a clip, how much memory that takes, and how close it comes to the device's own limit.

One run measures three things side by side on the same device: this network, the released code's way of running it
(float32 weights, attention that writes out its matrix), and the floor, the same multiplications at the matrix rate the
device was measured to have. Weights are random: time does not depend on them.

    python -m benchmarks.inference --frames 30 --out benchmarks/results/inference.json
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import hardware
from unish_model.network.config import UniSHConfig
from unish_model.network.model import UniSH

PARTS = {
    "encoder": "pi3.encoder",
    "point decoder": "pi3.point_decoder",
    "confidence decoder": "pi3.conf_decoder",
    "camera decoder": "pi3.camera_decoder",
    "scene": "pi3",
    "human backbone": "backbone",
    "human head": "human_head",
    "alignnet": "alignnet",
}


def wait(device: torch.device) -> None:
    """Let queued device work finish, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The best of some runs, after one that warms up."""
    best = float("inf")
    for index in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        if index or repeats == 0:
            best = min(best, time.perf_counter() - start)
    return best


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device, repeats=5)


def operations(config: UniSHConfig, frames: int, height: int, width: int) -> int:
    """Multiplications and additions of one clip, counted without doing them."""
    with torch.device("meta"):
        model = UniSH(config).eval()
        inputs = clip(frames, height, width, torch.device("meta"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return int(counter.get_total_flops())


def clip(frames: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Noise in the shape of a clip."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    images = torch.rand(1, frames, 3, height, width, device=device, generator=generator)
    patches = torch.rand(1, frames, 3, 256, 256, device=device, generator=generator)
    return images, patches, torch.tensor([0.0, 0.0, 200.0], device=device).expand(1, frames, 3)


def network(config: UniSHConfig, device: torch.device, dtype: torch.dtype) -> UniSH:
    """Random weights straight in their final type and place."""
    with torch.device("meta"):
        model = UniSH(config)
    trunk = model.trunk_names()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            value = torch.empty(parameter.shape, device=device, dtype=dtype if name in trunk else torch.float32)
            scale = 0.02 if parameter.ndim > 1 else 0.1
            owner._parameters[name.rpartition(".")[2]] = nn.Parameter(value.uniform_(-scale, scale))
        for name, buffer in model.named_buffers():
            owner = model.get_submodule(name.rpartition(".")[0])
            owner._buffers[name.rpartition(".")[2]] = torch.ones(buffer.shape, device=device)
    return model.eval()


@contextmanager
def stopwatch(model: UniSH, device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds spent in each part while the block runs; waits for the device around every part."""
    spent: dict[str, float] = defaultdict(float)
    started: dict[str, float] = {}
    with ExitStack() as stack:
        for name, path in PARTS.items():

            def enter(*_: Any, name: str = name) -> None:
                wait(device)
                started[name] = time.perf_counter()

            def leave(*_: Any, name: str = name) -> None:
                wait(device)
                spent[name] += time.perf_counter() - started[name]

            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield spent


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(model: UniSH, inputs: tuple[Tensor, Tensor, Tensor], device: torch.device, repeats: int) -> dict[str, Any]:
    """Time, shares and memory of `infer` on one clip."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = seconds(lambda: model.infer(*inputs), device, repeats)
    with stopwatch(model, device) as spent:
        start = time.perf_counter()
        model.infer(*inputs)
        wait(device)
        total = time.perf_counter() - start
    decoders = sum(spent[name] for name in PARTS if name.endswith("decoder"))
    shares = {
        "encoder": spent["encoder"],
        "cross-frame transformer and heads": spent["scene"] - spent["encoder"] - decoders,
        "small decoders": decoders,
        "human": spent["human backbone"] + spent["human head"],
        "alignnet": spent["alignnet"],
        "focal, shift and the rest": total
        - spent["scene"]
        - sum(spent[n] for n in PARTS if n[:5] in ("human", "align")),
    }
    return {
        "seconds": round(taken, 4),
        "frames_per_second": round(inputs[0].shape[1] / taken, 4),
        "peak_memory_gib": round(peak_bytes(device) / 2**30, 3),
        "shares": {name: round(value / total, 4) for name, value in shares.items()},
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    on_gpu = {"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    threads = {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    return hardware("torch") | {"kind": device.type} | threads | on_gpu


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--frames", type=int, default=30 if cuda else 2)
    parser.add_argument("--height", type=int, default=294)
    parser.add_argument("--width", type=int, default=518)
    parser.add_argument("--config", default="released", help="released, paper or tiny")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=5 if cuda else 1, help="0: one run, not warmed up")
    parser.add_argument("--no-naive", action="store_true", help="leave out the released way of running")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()

    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    config = UniSHConfig.named(options.config)
    work = operations(config, options.frames, options.height, options.width)
    rate = matrix_rate(device, dtype)
    inputs = clip(options.frames, options.height, options.width, device)
    ours = measure(network(config, device, dtype), inputs, device, options.repeats)
    floor = work / rate
    result: dict[str, Any] = {
        "what": {key: getattr(options, key) for key in ("config", "frames", "height", "width", "dtype")},
        "hardware": machine(device),
        "work_tflop": round(work / 1e12, 4),
        "matrix_rate_tflops": round(rate / 1e12, 4),
        "floor_seconds": round(floor, 4),
        "ours": ours | {"fraction_of_matrix_rate": round(floor / ours["seconds"], 4)},
    }
    if not options.no_naive:
        with sdpa_kernel(SDPBackend.MATH):
            # the process's peak memory cannot be taken back, so on a CPU this one includes the run before
            naive = measure(network(config, device, torch.float32), inputs, device, options.repeats)
        result["naive"] = naive
        result["times_faster_than_naive"] = round(naive["seconds"] / ours["seconds"], 3)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""``fastcompress info``: versions, the content of the compiled library, and the backend of each op."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from fastcompress import __version__
from fastcompress.cli.errors import EXIT_OK
from fastcompress.dispatch import backends
from fastcompress.dispatch.library import COMPILED, PROBLEM, cuda_archs, cuda_version


def add_command(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "info",
        help="versions, content of the compiled library, and the backend of each op",
        description="Print versions, the content of the compiled library, the CUDA devices, and which backend each op "
        "uses for CPU and CUDA tensors, and why. FASTCOMPRESS_BACKEND=cuda, triton or reference selects another.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--models", action="store_true", help="print which audio LLMs of transformers are supported")
    parser.set_defaults(run=_run_info)


def _run_info(options: argparse.Namespace) -> int:
    if options.models:
        from fastcompress.integrations.transformers import support, table

        print(json.dumps(support(), indent=1) if options.json else table())
        return EXIT_OK
    found = collect()
    print(json.dumps(found, indent=1) if options.json else format_text(found))
    return EXIT_OK


def collect() -> dict[str, Any]:
    """Collect what ``fastcompress info`` prints, ready for JSON. Initializes CUDA."""
    driver = backends.driver_version()
    return {
        "versions": {
            "fastcompress": __version__,
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "torch_hip": torch.version.hip,
            "triton": _version("triton"),
            "python": platform.python_version(),
        },
        "library": {
            "compiled": COMPILED,
            "problem": PROBLEM,
            "cpu_isa": torch.ops.fastcompress.cpu_isa() if COMPILED else None,
            "cuda_version": cuda_version() or None,
            "cuda_archs": cuda_archs() or None,
        },
        "driver_cuda": None if driver is None else f"{driver[0]}.{driver[1]}",
        "devices": [
            {"name": device.name, "capability": "{}.{}".format(*device.capability)}
            for device in backends.cuda_devices()
        ],
        "ops": {
            op: {device: {"backend": choice.backend, "reason": choice.reason} for device, choice in by_device.items()}
            for op, by_device in backends.choices().items()
        },
    }


def format_text(info: dict[str, Any]) -> str:
    """Format the result of ``collect`` as text."""
    versions, library = info["versions"], info["library"]
    toolkit = f"CUDA {versions['torch_cuda']}" if versions["torch_cuda"] else "no CUDA"
    toolkit = f"ROCm {versions['torch_hip']}" if versions["torch_hip"] else toolkit
    lines = [
        f"fastcompress  {versions['fastcompress']}",
        f"torch         {versions['torch']} ({toolkit})",
        f"triton        {versions['triton'] or 'not installed'}",
        f"python        {versions['python']}",
        f"library       {_library_text(library)}",
    ]
    driver = f", driver for CUDA {info['driver_cuda']}" if info["driver_cuda"] else ""
    for number, device in enumerate(info["devices"]):
        lines.append(f"cuda:{number}        {device['name']}, capability {device['capability']}{driver}")
    if not info["devices"]:
        lines.append("cuda          no device")
    width = max(map(len, info["ops"])) + 2
    lines += ["", f"{'op':<{width}}{'on cpu':<12}on cuda"]
    reasons: dict[str, None] = {}  # unique, in order
    for op, by_device in info["ops"].items():
        lines.append(f"{op:<{width}}{by_device['cpu']['backend']:<12}{by_device['cuda']['backend']}")
        for device, choice in by_device.items():
            reasons[f"{choice['backend']} on {device}: {choice['reason']}"] = None
    return "\n".join([*lines, "", *reasons])


def _library_text(library: dict[str, Any]) -> str:
    if not library["compiled"]:
        return f"none: {library['problem']}"
    if not library["cuda_archs"]:
        return f"compiled, CPU kernels {library['cpu_isa']}, no CUDA kernels"
    cuda = f"CUDA {library['cuda_version']} kernels for {library['cuda_archs']}"
    return f"compiled, CPU kernels {library['cpu_isa']}, {cuda}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

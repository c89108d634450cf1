"""Packaging: the top-level folders are the subpackages of `worldloop`.

`engine/` is imported as `worldloop.engine` and so on, so that nothing with a
generic name lands in site-packages.  Tool configuration lives in pyproject.toml,
tested versions in constraints.txt.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ROOMS = ("kernels", "engine", "rl", "training", "bench")


def mapped_packages() -> dict[str, str]:
    """Import name -> folder, for every package of the tree."""
    mapping = {"worldloop": "worldloop"}
    mapping.update({f"worldloop.{sub}": f"worldloop/{sub}" for sub in find_packages("worldloop")})
    for room in ROOMS:
        mapping[f"worldloop.{room}"] = room
        for sub in find_packages(room):
            mapping[f"worldloop.{room}.{sub}"] = f"{room}/{sub.replace('.', '/')}"
    return mapping


def version() -> str:
    text = (ROOT / "worldloop" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('worldloop/__init__.py: no line __version__ = "..."')
    return match.group(1)


PACKAGES = mapped_packages()

setup(
    name="worldloop",
    version=version(),
    description="Reinforcement learning of vision-language-action policies in a video world model",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir=PACKAGES,
    packages=list(PACKAGES),
    package_data={
        "worldloop": [
            "py.typed",
            "weights/**/*.safetensors",
            "weights/**/*.json",
            "data/**/*.json",
            "data/**/*.parquet",
            "data/**/*.mp4",
        ],
        "worldloop.kernels": ["csrc/*"],
        "worldloop.bench": ["results/*.json"],
    },
    entry_points={
        "console_scripts": ["worldloop = worldloop.cli:main"],
        "vllm.general_plugins": ["worldloop = worldloop.engine.policy.vllm_plugin:register"],
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=1.26,<2.4",  # triton 3.6 raises TypeError with numpy 2.4
        "safetensors>=0.5",
        "av>=14",
        "pyarrow>=17",
        "gymnasium>=1.0",
        "tyro>=0.9",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "pillow>=10",
        "tensorboard>=2.16",
    ],
    extras_require={
        "sim": ["mani_skill==3.0.1"],
        "libero": ["hf-libero==0.1.4"],  # `make setup-libero` installs less: what the tasks need
        "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
        "gpu": ["triton>=3.6,<3.8"],
        "hub": ["huggingface_hub>=0.25", "tokenizers>=0.20"],
        # The TensorRT back end: the exporter, and NVIDIA's library (CUDA machines only).
        "tensorrt": ["onnx>=1.20", "onnxscript>=0.6", "tensorrt>=10.8"],
        "dev": [
            "setuptools>=77",
            "wheel",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-benchmark>=5.1",
            "ruff>=0.9",
            "mypy>=1.14",
            "fastapi>=0.115",  # the policy server, as in extra serve
            "uvicorn>=0.30",
            "triton>=3.6,<3.8; sys_platform == 'linux'",  # kernels run on CPU, interpreted
            "scikit-image>=0.24",  # outside reference of SSIM, in tests only
            "diffusers>=0.42,<0.43",  # outside reference in tests only
            "transformers>=5.16,<5.20",
            "accelerate>=1.10",
            "onnx>=1.20",  # exports of the TensorRT back end, checked on a CPU
            "onnxscript>=0.6",
            "onnxruntime>=1.22",
        ],
    },
    zip_safe=False,
)

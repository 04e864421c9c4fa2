"""Packaging of MegaResNorm. ``pip install -c constraints.txt -e .`` pins what was tested."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "megaresnorm" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="megaresnorm",
    version=version,
    description="Pretraining of transformers hundreds of layers deep: every residual topology, exact in every parallel layout",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megaresnorm", "megaresnorm.*"]),
    package_data={"megaresnorm.kernels.cpu": ["*.c", "*.h"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "rich>=14.1",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboard>=2.16",
    ],
    extras_require={
        "data": ["datasets>=4.0", "tokenizers>=0.20"],
        "hf": ["transformers>=5.0"],
        "plots": ["matplotlib>=3.8"],
        "deepspeed": ["deepspeed>=0.17"],
        "te": ["transformer-engine[pytorch]>=2.0"],
        # NVIDIA Apex is built from its sources; the package of that name on PyPI is another program.
        "bench": ["transformers>=5.0", "megatron-core"],
        "dev": [
            "datasets>=4.0",  # which no longer runs code of a data set
            "matplotlib>=3.8",
            "megatron-core; python_version < '3.12'",
            "mypy>=1.13",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "transformers>=5.0",
            # Without a GPU too: its interpreter runs the kernels, its compiler builds them.
            "triton>=3.4; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["megaresnorm = megaresnorm.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

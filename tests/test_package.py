"""What `pip install .` brings: flame and flame_ext, nothing whose name others need (evaluate, train, data).

    pytest tests/test_package.py

The wheel is built from a copy of the checkout and installed into an empty environment. There, in an empty
folder, it encodes a caption and a picture. torch and the like are lent by the environment of the tests.
"""
import json
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import flame

ROOT = Path(__file__).resolve().parent.parent
SOURCES = "*.py", "*.toml", "README.md", "ext/*", "data/*.py"

USE = """
import sys
from importlib.metadata import version
import flame
from PIL import Image

llm, checkpoint = sys.argv[1:]
facets = flame.TextEncoder(llm).encode(["A red kite above a beach."], prompts="long")
model = flame.load(checkpoint)
image = model.encode_image(model.preprocess(Image.new("RGB", (40, 30), "red"))[None])
assert flame.__version__ == version("flame-pretrain") and all(hasattr(flame, name) for name in flame.__all__)
public = (flame.load, flame.load_tokenizer, flame.similarity, flame.TextEncoder.encode, flame.Store.read,
          flame.Flame.encode_image, flame.Flame.encode_text, flame.Flame.preprocess)
assert all("return" in function.__annotations__ for function in public)
score = flame.similarity(image, model.encode_text(facets, "long"))
print(flame.__file__, flame.flame_ext.__file__, *score.shape)
"""


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(python, site-packages) of a new environment that holds our wheel, and borrows everything else."""
    folder = tmp_path_factory.mktemp("package")
    checkout, environment = folder / "checkout", folder / "environment"
    for pattern in SOURCES:
        for path in ROOT.glob(pattern):
            copy = checkout / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    # What is compiled already is not compiled again: half a minute.
    compiled = checkout / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    compiled.mkdir(parents=True)
    for path in ROOT.glob("flame_ext*.so"):
        shutil.copyfile(path, compiled / path.name)
    have_requirements = find_spec("pybind11") and find_spec("wheel")  # else pip fetches what building wants
    isolation = ["--no-build-isolation"] if have_requirements else []
    pip("wheel", "--no-deps", *isolation, "--wheel-dir", folder, checkout)

    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", *folder.glob("*.whl"))
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "lent.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return python, site


def test_the_wheel_holds_the_method_and_no_stage(installed):
    _, site = installed
    assert {module.name for module in pkgutil.iter_modules([str(site)])} == {"flame", "flame_ext"}


def test_a_caption_and_a_picture_are_encoded_from_an_empty_folder(installed, byte_llm, tmp_path):
    python, site = installed
    empty, checkpoint = tmp_path / "empty", tmp_path / "checkpoint"
    empty.mkdir()
    checkpoint.mkdir()
    config = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 1, "heads": 3, "projector_hidden": 32,
              "pool_first": True, "text_dim": 32, "text_rank": 0}
    save_file(flame.Flame(config).state_dict(), checkpoint / "model.safetensors")
    entries = {"model": config, "llm": {"questions": flame.questions()}}
    (checkpoint / "config.json").write_text(json.dumps(entries))
    command = [python, "-c", USE, byte_llm, checkpoint]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    method, extension, texts, images = done.stdout.split()
    assert Path(method).parent == Path(extension).parent == site
    assert (texts, images) == ("1", "1")

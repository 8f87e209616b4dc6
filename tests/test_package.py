"""Tests the wheel: it has flame and flame_ext only, because train, evaluate and data are common names."""
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
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


@pytest.fixture
def site(tmp_path):
    """Build the wheel; return the folder in which it is unpacked."""
    folder = tmp_path / "package"
    checkout, site = folder / "checkout", folder / "site"
    for pattern in SOURCES:
        for path in ROOT.glob(pattern):
            copy = checkout / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    # Reuse the compiled extension: compiling it takes half a minute.
    compiled = checkout / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    compiled.mkdir(parents=True)
    for path in ROOT.glob("flame_ext*.so"):
        shutil.copyfile(path, compiled / path.name)
    have_requirements = find_spec("pybind11") and find_spec("wheel")  # otherwise pip downloads them
    isolation = ["--no-build-isolation"] if have_requirements else []
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps", *isolation]
    done = subprocess.run([*pip, "--wheel-dir", folder, checkout], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel, = folder.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    return site


def test_wheel_has_only_flame_and_flame_ext_and_works(site, byte_llm, tmp_path):
    assert {module.name for module in pkgutil.iter_modules([str(site)])} == {"flame", "flame_ext"}
    empty, checkpoint = tmp_path / "empty", tmp_path / "checkpoint"
    empty.mkdir()
    checkpoint.mkdir()
    config = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 1, "heads": 3, "projector_hidden": 32,
              "pool_first": True, "text_dim": 32, "text_rank": 0}
    save_file(flame.Flame(config).state_dict(), checkpoint / "model.safetensors")
    entries = {"model": config, "llm": {"prompts": flame.prompts_to_json()}}
    (checkpoint / "config.json").write_text(json.dumps(entries))
    command = [sys.executable, "-c", USE, byte_llm, checkpoint]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    module, extension, images, texts = done.stdout.split()
    assert Path(module).parent == Path(extension).parent == site
    assert (images, texts) == ("1", "1")

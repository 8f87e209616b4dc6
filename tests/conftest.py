"""Shared fixtures and helpers: LLM folders, released checkpoints, measures of error and memory."""
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = [
    "A red kite flies above a calm sea at sunset, with a small boat to its left.", "A cat.", "",
    'He said "(hello)" to the dog?', '"Quoted"', "5 × 3 = 15?", "一只红色的风筝在海上飞。",
    "Une très longue promenade " * 12, "a\u0301 🦊\tand  two  spaces", "A cat."]


def centered_error(ours, reference):
    """Return the largest error relative to the largest value, after subtracting the mean over dim 0."""
    mean = reference.mean(0)
    return ((ours - reference).abs().max() / (reference - mean).abs().max()).item()


def centered_cosine(ours, reference):
    """Return the cosines [N, K] of [N, K, D], after subtracting the reference's mean over texts from both."""
    mean = reference.mean(0)
    return torch.cosine_similarity(ours - mean, reference - mean, dim=-1)


MEMORY = """
import re, torch, flame
from data import compat
def peak_memory():  # unlike ru_maxrss, VmHWM does not start at the parent's value
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
"""


def memory_grown(setup, code, expression="0", **environment):
    """Return (bytes that code adds to the peak memory of a new process, the int value of expression)."""
    script = f"{MEMORY}{setup}\nbefore = peak_memory()\n{code}\nprint(peak_memory() - before, {expression})"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.fixture(scope="session")
def llm():
    """The demo's SmolLM2-135M-Instruct. Make it on first use and keep it for the demo."""
    folder = ROOT / "data" / "demo" / "llm"
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist: one worker makes it, the others wait
        from data.corpus.llm import make_llm
        make_llm(folder)
    return folder


@pytest.fixture(scope="session")
def make_random_llm(llm, tmp_path_factory):
    """Return make(**config) -> folder of a small random LLM by transformers, with the demo's tokenizer."""
    def make(family="Llama", max_shard_size="1GB", seed=0, **config):
        import transformers
        base = dict(vocab_size=49152, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
                    initializer_range=0.2)
        model_class = getattr(transformers, f"{family}ForCausalLM")
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**base | config))
        folder = tmp_path_factory.mktemp("llm")
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        (folder / "tokenizer.json").write_bytes((llm / "tokenizer.json").read_bytes())
        return folder
    return make


@pytest.fixture(scope="session")
def tiny_llm(make_random_llm):
    return make_random_llm()


@pytest.fixture(scope="session")
def byte_llm(tmp_path_factory):
    """Folder of a random Llama with a byte tokenizer: 100 kB, so it is cheap to copy."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    folder = tmp_path_factory.mktemp("byte-llm")
    config = {"model_type": "llama", "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    matrices = {"model.embed_tokens": (257, 32), "lm_head": (257, 32)}
    norms = ["model.norm"]
    for layer in ("model.layers.0.", "model.layers.1."):
        norms += [layer + "input_layernorm", layer + "post_attention_layernorm"]
        matrices |= {layer + f"self_attn.{x}_proj": (16 if x in "kv" else 32, 32) for x in "qkvo"}
        matrices |= {layer + "mlp.gate_proj": (64, 32), layer + "mlp.up_proj": (64, 32)}
        matrices[layer + "mlp.down_proj"] = 32, 64
    random = torch.Generator().manual_seed(0)
    weights = {f"{name}.weight": torch.randn(shape, generator=random) / 5 for name, shape in matrices.items()}
    weights |= {f"{name}.weight": torch.ones(32) for name in norms}
    save_file(weights, folder / "model.safetensors")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120kite"]  # and a word that is never used
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def released_checkpoint(tmp_path):
    """Return make(prefix, **tensors) -> (released checkpoint with random weights, image tower, projector).

    LLM and optimizer tensors are included. tensors: added or replaced by their full key; None omits one.
    """
    import numpy as np
    from open_clip.transformer import VisionTransformer

    def make(prefix="module.", **tensors):
        torch.manual_seed(0)
        visual = VisionTransformer(image_size=32, patch_size=8, width=128, layers=3, heads=2, mlp_ratio=4,
                                   output_dim=16, pool_type="avg", output_tokens=True).eval()
        mm = torch.nn.Sequential(
            torch.nn.Linear(128, 40), torch.nn.GELU(), torch.nn.Linear(40, 48), torch.nn.LayerNorm(48))
        for p in [*visual.parameters(), *mm.parameters()]:
            torch.nn.init.normal_(p, std=0.3)
        weights = {f"visual.{name}": x for name, x in visual.state_dict().items()}
        weights |= {f"mm.{name}": x for name, x in mm.state_dict().items()}
        weights |= {"logit_scale": torch.tensor(3.0), "logit_bias": torch.tensor(-9.0),
                    "text.lm_head.weight": torch.randn(8, 8).half()}
        weights = {prefix + name: x for name, x in weights.items()} | tensors
        group = {"lr": np.float64(5e-4), "betas": (0.9, 0.95), "params": [0]}  # as cosine_lr sets it
        optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [group]}
        weights = {name: x for name, x in weights.items() if x is not None}
        torch.save({"epoch": 32, "name": "flame", "scaler": {"scale": 65536.0}, "state_dict": weights,
                    "optimizer": optimizer}, tmp_path / "epoch_32.pt")
        visual.ln_post = torch.nn.Identity()  # in the file, but FLAME does not use it
        return tmp_path / "epoch_32.pt", visual, mm
    return make


@pytest.fixture
def small_clip(tmp_path):
    """Return "MODEL:FILE" of a small random open_clip model."""
    import open_clip
    config = {"embed_dim": 64, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}}
    (tmp_path / "tests-small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tests-small.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tests-small").state_dict(), tmp_path / "small.pt")
    return f"tests-small:{tmp_path / 'small.pt'}"


def pytest_configure():
    """Limit each pytest-xdist worker (-n), and the commands that its tests run, to one thread."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_sessionfinish(session):
    """In CI, fail if a test was skipped for another reason than a missing GPU."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a pytest-xdist worker, which sends its results to the main session
        return
    reasons = []
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if "GPU" not in reason:
            reasons.append(reason)
    if os.environ.get("CI") and reasons:
        reporter.write_line(f"skipped in CI: {reasons}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

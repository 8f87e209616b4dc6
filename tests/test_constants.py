"""Tests that the paper's constants are used: the recipe for CC3M, AdamW's, the logit scale's, templates."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

import evaluate
import flame
import train
from data import projection

def test_recipe_for_cc3m():
    s = train.preset_settings("cc3m")
    expected = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "heads": 12,
                "init": "pytorch", "projector_hidden": 4096, "pool_first": False, "loss": "sigmoid",
                "text_projection": "none", "positives": 6, "raw_always": False, "batch": 8 * 384,
                "epochs": 32, "lr": 5e-4,
                "weight_decay": 0.5, "warmup": 2000, "init_scale": 10, "crop_scale": 0.9, "patch_dropout": 0}
    assert {name: s[name] for name in expected} == expected


def test_logit_scale_is_clamped_and_adamw_has_the_papers_constants(monkeypatch):
    config = dict(image_size=16, patch_size=8, width=24, layers=1, heads=3, projector_hidden=32,
                  pool_first=True)
    model = flame.Flame(config | projection.text_config("none", 16, flame.FACET_COLUMNS))
    assert model.logit_bias.item() == -10
    store = SimpleNamespace(meta={"D": 16})
    s = config | dict(seed=0, init="pytorch", init_scale=10.0, text_projection="none", weight_decay=0.5,
                      lr=0.0, warmup=1, steps=10)
    model, optimizer = train.build(store, range(11), s, torch.device("cpu"), images=None)
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in optimizer.param_groups)

    def forward_backward(model, *rest):
        sum(parameter.sum() for parameter in model.parameters()).backward()
        return torch.tensor(1.0)
    monkeypatch.setattr(train, "forward_backward", forward_backward)
    run = train.Run(s, None, None, torch.device("cpu"), model, model, optimizer, ())
    for value, clamped in ((9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)):
        torch.nn.init.constant_(model.logit_scale, value)
        train.train_step(run, 0, None)
        assert model.logit_scale.item() == pytest.approx(clamped)


def test_average_over_templates_equals_clip_benchmark(monkeypatch):
    """The templates' vectors have unequal norms, so a plain mean would be another class embedding."""
    rng = np.random.default_rng(0)
    names, templates = [f"class {n}" for n in range(20)], ["a {c}", "two {c}", "no {c}"]
    labels = np.repeat(range(20), 30)
    centers = rng.standard_normal((20, 16))
    image = centers[labels] + 1.5 * rng.standard_normal((600, 16))
    image = (image / np.linalg.norm(image, axis=1, keepdims=True)).astype(np.float32)
    vectors = {template.replace("{c}", name): rng.choice([0.1, 1, 9]) * (center + rng.standard_normal(16))
               for name, center in zip(names, centers) for template in templates}

    def encode(texts):
        return np.array([vectors[text] for text in texts], np.float32)
    model = SimpleNamespace(encode_text=lambda texts: torch.from_numpy(encode(texts)))
    classes = zero_shot_classifier(model, Tokens, names, templates, "cpu", amp=False)
    monkeypatch.setattr(evaluate, "encode_images", lambda encoders, locations: (image, range(600)))
    monkeypatch.setattr(evaluate, "encode_texts", lambda encoders, texts, prompts: encode(texts))
    ours = [template.replace("{c}", "{}") for template in templates]
    scores, _ = evaluate.score_classes(None, "raw", [None] * 600, labels, names, ours)
    predicted = (torch.from_numpy(image) @ classes).argmax(1).numpy()
    assert scores["top1"].samples[0, 0] == pytest.approx(100 * np.mean(predicted == labels), abs=1e-6)


class Tokens(list):
    """Texts with the method of a tensor of tokens that clip_benchmark calls."""
    def to(self, device):
        return self

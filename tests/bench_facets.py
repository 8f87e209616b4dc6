"""How much does each facet contribute? Retrieval of the demo's long captions with some of the seven facets.

    python tests/bench_facets.py [--checkpoint out/demo]

The text embedding is the mean over the chosen facets. The checkpoint is the same in all rows.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
from data.benchmarks import read  # noqa: E402
from data.encoders import encode_facets, encode_images, open_encoders  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "out/demo")
    parser.set_defaults(open_clip=None, llm=None, device="cpu", out=ROOT / "results")
    args = parser.parse_args()
    encoders, _ = open_encoders(args)
    scenes, captions, *_ = read("demo", ROOT / "data/demo")
    image, _ = encode_images(encoders, scenes)
    facets = encode_facets(encoders, captions["long"], "long")  # [N, 7, D]
    every = list(range(facets.shape[1]))
    print("facets           R@1 text to image, image to text")
    for subset in [*(every[:k + 1] for k in every), *([k] for k in every[1:]),
                   *(every[:k] + every[k + 1:] for k in every)]:
        recall = evaluate.retrieval(facets[:, subset].mean(1), image, range(len(image)))
        first = [f"{recall[way]['R@1']:.1f}" for way in ("text_to_image", "image_to_text")]
        print(f"{' '.join(map(str, subset)):17}{', '.join(first)}", flush=True)


if __name__ == "__main__":
    main()

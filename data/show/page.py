"""The page of evaluate.py --search: type a text or drop an image, and see the best images of a gallery.

It loads no fonts or scripts from elsewhere and sends no data anywhere. It listens on 127.0.0.1 only;
data/README.md shows how to put it behind a web server.
"""
import functools
import os
import sys
from html import escape
from pathlib import Path

from data.encoders import encode_images, encode_texts
from data.images import ImageLocation
from data.show.sheet import best_of, printable, thumbnail
from flame import InputError

LONG = 15   # words; a longer text is encoded with the long prompt set
TILES = 24  # images shown at first, unless --top is larger; the button shows as many more
SIDE = 400  # thumbnail side, pixels


def choose_prompts(args, query):
    return args.prompts or ("long" if len(query.split()) > LONG else "raw")


def serve(args, locations, image, encoders, unreadable=0):
    """Open the page in the background and return its gradio Blocks; local_url is the address.

    locations: the gallery of M images. image: their unit vectors [M, D]. unreadable: number of images left
    out. gradio's client can call "text", "image" and "more" too.
    """
    try:
        import gradio
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError:
        raise InputError("--search without a text opens a page: pip install gradio") from None
    encoders.text_encoder()  # load the LLM now, not at the first query
    encoders = encoders._replace(cache=None)
    step = max(TILES, args.top)
    cached_thumbnail = functools.lru_cache(1024)(lambda i: thumbnail(locations[i], SIDE))

    def show(vector, n=step):
        """Return what `shown` below shows: the n best images for a vector [D], or the first n for zeros."""
        scores, best = best_of(image, vector, n)
        tiles = [(cached_thumbnail(i), f"{scores[i]:.3f} " * bool(vector.any()) + file_name(locations[i]))
                 for i in best]
        text = f"{len(tiles)} of {len(image)} images shown; show {step} more"
        return vector, n, tiles, gradio.update(value=text, visible=n < len(image))

    def by_text(text):
        text = " ".join(text.split())
        vector = encode_texts(encoders, [text], choose_prompts(args, text))[0] if text else 0 * image[0]
        return *show(vector), None

    def by_image(path):
        vectors, _ = encode_images(encoders, [ImageLocation(path)])
        return *show(vectors[0]), ""

    with gradio.Blocks(title="FLAME", fill_width=True, delete_cache=(1800, 1800),
                       analytics_enabled=False) as blocks:
        summary = f"{len(image):,} images of {args.images}, {unreadable} unreadable"
        gradio.HTML(f"<b>FLAME</b> {escape(printable(summary))}")
        with gradio.Row():
            text = gradio.Textbox(
                label="a text to search for", max_lines=6, scale=3, min_width=360, autofocus=True,
                placeholder="a fox in the snow, ein Fuchs im Schnee, un renard dans la neige",
                submit_btn=True)
            dropped = gradio.Image(
                label="or an image", type="filepath", image_mode=None, sources=["upload"], height=120,
                scale=1, buttons=[])
        gallery = gradio.Gallery(show_label=False, height="auto", format="jpeg", object_fit="contain",
                                 interactive=False, buttons=[])
        more = gradio.Button(visible=False)
        vector, n = gradio.State(), gradio.State()
        shown = [vector, n, gallery, more]
        event = {"show_progress": "minimal", "concurrency_id": "encoders"}  # one at a time
        text.submit(by_text, text, [*shown, dropped], api_name="text", **event)
        dropped.upload(by_image, dropped, [*shown, text], api_name="image", **event)
        more.click(lambda vector, n: show(vector, n + step), [vector, n], shown, api_name="more", **event)
        blocks.load(lambda: show(0 * image[0]), None, shown, api_name=False)
    # Without it, a web page whose host name resolves to 127.0.0.1 could read this one.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    blocks.launch(server_name="127.0.0.1", inbrowser=sys.stdout.isatty(), prevent_thread_lock=True,
                  quiet=True, share=False, show_error=True, ssr_mode=False, run_history=False,
                  footer_links=[], max_file_size="50mb", theme=theme,
                  css_paths=Path(__file__).with_name("page.css"), app_kwargs={"middleware": [hosts]})
    print(f"{len(image)} images to search: {blocks.local_url}   (Ctrl-C to stop)", flush=True)
    return blocks


def file_name(location):
    return printable(os.path.basename(location.path))

"""The page of evaluate.py --search: type a text or drop an image, and see the best images of a gallery.

It loads no fonts or scripts from elsewhere and sends no data anywhere. It listens on 127.0.0.1 only;
data/README.md shows how to put it behind a web server.
"""
import base64
import functools
import io
import os
import re
import sys
from html import escape
from pathlib import Path

from data.encoders import encode_facets, encode_images, trained_facets
from data.images import ImageLocation, open_image
from data.show.sheet import best_of, printable, thumbnail
from data.show.words import words_of
from flame import InputError, PROMPTS

LONG = 15   # words; a longer text is encoded with the long prompt set
TILES = 24  # images shown at first, unless --top is larger
MORE = 72   # further images, behind a button
SIDE = 240  # thumbnail side, pixels

# A click reports its image. If the words are out of sight, the page scrolls to them.
CLICK = """element.addEventListener('click', event => {
    const tile = event.target.closest('button');
    if (tile) trigger('click', {image: Number(tile.dataset.image)});
});"""
SCROLL = "() => document.getElementById('words').scrollIntoView({behavior: 'smooth', block: 'nearest'})"


def choose_prompts(args, query):
    return args.prompts or ("long" if len(query.split()) > LONG else "raw")


def facet_label(prompt):
    """'the category of the main object in this image means ...' -> 'the category of the main object'"""
    return re.sub("( (in|of) this image)? means in just one word.*", "", prompt)


def serve(args, locations, image, encoders, unreadable=0):
    """Open the page in the background and return its gradio Blocks; local_url is the address.

    locations: the gallery of M images. image: their unit vectors [M, D]. unreadable: number of images left
    out. gradio's client can call "text", "facets", "image" and "words" too.
    """
    try:
        import gradio
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError:
        raise InputError("--search without a text opens a page: pip install gradio") from None
    encoders.text_encoder()  # load the LLM now, not at the first query
    by_text, by_image, by_click = callbacks(gradio, args, locations, image, encoders._replace(cache=None))
    summary = f"{len(image):,} images of {args.images}, {unreadable} unreadable"
    with gradio.Blocks(title="FLAME", fill_width=True, delete_cache=(1800, 1800),
                       analytics_enabled=False) as blocks:
        gradio.HTML(f"<b>FLAME</b> {escape(printable(summary))}", elem_id="head")
        with gradio.Row(elem_id="query"):
            text = gradio.Textbox(
                label="a text to search for", elem_id="text", max_lines=6, container=False, scale=4,
                placeholder="a fox in the snow, ein Fuchs im Schnee, un renard dans la neige",
                autofocus=True, submit_btn=True)
            dropped = gradio.Image(
                label="an image to search for", elem_id="image", type="filepath", image_mode=None,
                sources=["upload"], height=80, scale=1, show_label=False, buttons=[],
                placeholder="or drop an image")
        facets = gradio.CheckboxGroup(label="Facets to search with", visible=False, elem_id="facets")
        with gradio.Row(elem_id="results"):
            words = gradio.HTML(elem_id="words", apply_default_css=False)
            gallery = gradio.HTML(by_text("")[0], elem_id="gallery", js_on_load=CLICK,
                                  apply_default_css=False)
        event = {"show_progress": "minimal", "concurrency_id": "encoders"}  # one at a time
        text.submit(by_text, text, [gallery, facets, dropped], api_name="text", **event)
        facets.input(by_text, [text, facets], [gallery, facets, dropped], api_name="facets", **event)
        dropped.upload(by_image, dropped, [gallery, facets, text], api_name="image", **event)
        if hasattr(encoders.model, "mm"):  # open_clip models have no LLM to find words in
            gallery.click(by_click, None, words, api_name="words", **event).then(None, js=SCROLL)
    # Without it, a web page whose host name resolves to 127.0.0.1 could read this one.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    blocks.launch(server_name="127.0.0.1", inbrowser=sys.stdout.isatty(), prevent_thread_lock=True,
                  quiet=True, share=False, show_error=True, ssr_mode=False, run_history=False,
                  footer_links=[], max_file_size="50mb", theme=theme,
                  css_paths=Path(__file__).with_name("page.css"), app_kwargs={"middleware": [hosts]})
    print(f"{len(image)} images to search: {blocks.local_url}   (Ctrl-C to stop)", flush=True)
    return blocks


def callbacks(gradio, args, locations, image, encoders):
    """Return the functions that answer a text, an image, and a click on an image of the gallery."""
    html_of = functools.lru_cache(4096)(lambda i: image_html(locations[i], SIDE))

    @functools.lru_cache(256)
    def encode_query(text):
        """Return (labels of the trained facets, their embeddings [K, D])."""
        prompts = choose_prompts(args, text)
        labels = [facet_label(PROMPTS[prompts].facets[k]) for k in trained_facets(encoders.model, prompts)]
        return labels, encode_facets(encoders, [text], prompts)[0]

    def gallery_html(vector):
        """Return the best images for a vector [D]; for zeros, the first images without scores."""
        shown = max(TILES, args.top)
        scores, best = best_of(image, vector, shown + MORE)
        shares = scores / max(1e-6, scores.max())
        tiles = [f'<button data-image="{i}">{html_of(i)}<hr style="width: {shares[i]:.0%}">'
                 f"<p><b>{scores[i]:.3f}</b>{file_name(locations[i])}</p></button>" for i in best]
        start, end = f'<div class="tiles{"" if vector.any() else " plain"}">', "</div>"
        html = "".join([start, *tiles[:shown], end])
        if tiles[shown:]:
            summary = f"{shown} of {len(image)} images shown; show {len(tiles) - shown} more"
            html += "".join(["<details><summary>", summary, "</summary>", start, *tiles[shown:], end])
        return html

    def by_text(text, chosen=None):
        """chosen: labels of the facets to use (default: all)."""
        text = " ".join(text.split())
        if not text:
            return gallery_html(0 * image[0]), gradio.CheckboxGroup(visible=False), None
        labels, facets = encode_query(text)
        chosen = [label for label in labels if label in (chosen or labels)] or labels  # of this prompt set
        rows = [label in chosen for label in labels]
        switches = gradio.CheckboxGroup(labels, value=chosen, visible=len(labels) > 1)
        return gallery_html(facets[rows].mean(0)), switches, None

    def by_image(path):
        vectors, _ = encode_images(encoders, [ImageLocation(path)])
        return gallery_html(vectors[0]), gradio.CheckboxGroup(visible=False), ""

    def by_click(event: gradio.EventData):
        location = locations[int(event.image)]
        with open_image(location) as opened:
            words, strengths = words_of(encoders.model, encoders.text_encoder().llm_dir, opened)
        cells = [f'<span style="--letters: {max(4, len(word))}; opacity: {share:.2f}">{escape(word)}</span>'
                 for word, share in zip(words.flat, strengths.flat)]
        return (f'<div class="patches" style="--side: {len(words)}">{image_html(location, 720)}'
                f"{''.join(cells)}</div>{file_name(location)}"
                "<small>The LLM's nearest word for each patch; fainter means a lower cosine. The words come "
                "with training: after a short one, many of them make no sense.</small>")
    return by_text, by_image, by_click


def image_html(location, side):
    """Return an <img> element that contains a thumbnail; its alternative text is the file's name."""
    out = io.BytesIO()
    thumbnail(location, side).save(out, format="jpeg", quality=82)
    data = base64.b64encode(out.getvalue()).decode()
    name = escape(printable(os.path.basename(location.path)))
    return f'<img src="data:image/jpeg;base64,{data}" alt="{name}">'


def file_name(location):
    return f"<small>{escape(printable(os.path.basename(location.path)))}</small>"

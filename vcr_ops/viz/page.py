"""A folder of figures and the page that shows them."""

import html
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..inspect import Concepts

PAGE = "index.html"


def load_figures() -> Any:
    """The module that draws, which takes packages that vcr_ops itself doesn't.

    Raises:
        RuntimeError: one of them is missing; says what to install.
    """
    try:
        from . import figures
    except ImportError as error:
        raise RuntimeError(
            f"{error}; drawing takes matplotlib, Pillow and scikit-learn: pip install 'vcr-ops[viz]'"
        ) from error
    return figures


class _Picture(NamedTuple):
    file: str
    alt: str
    caption: str


def draw(
    seen: Mapping[str, Concepts],
    images: Sequence[NDArray[np.uint8]],
    names: Sequence[str],
    out: str | os.PathLike[str],
    *,
    title: str = "Concepts",
    seed: int = 0,
) -> Path:
    """Draw what :func:`vcr_ops.inspect` found on images, as PNGs and a page that shows them.

    Args:
        seen: of a network for images. images: as the network saw them, (H, W, 3) each, uint8. names: one each.
        out: a folder; it is made where it is missing. Files of the same names in it are replaced, and only once all is
            drawn. title: of the page. seed: of the t-SNE.
    Returns:
        The page, out/index.html.
    Raises:
        RuntimeError: matplotlib, Pillow or scikit-learn is missing.
        ValueError: nothing was seen, the numbers of images, names and attention maps differ, the maps aren't 2-D, or
            out is a file.
    """
    if not seen:
        raise ValueError("seen is empty: no block has run")
    for path, concepts in seen.items():
        if len(images) != len(names) or len(concepts.attention) != len(images):
            counts = f"{len(images)} images, {len(names)} names, {len(concepts.attention)} attention maps of {path!r}"
            raise ValueError(f"there are {counts}; these take the same number")
        if concepts.attention.dim() != 4:
            raise ValueError(f"the attention of {path!r} has {concepts.attention.dim() - 2} spatial dims; it takes 2")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {out}, a file; it takes a folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        sections = {path: list(_block(path, found, images, names, Path(folder), seed)) for path, found in seen.items()}
        (Path(folder) / PAGE).write_text(_page(title, seen, sections), encoding="utf-8")
        out.mkdir(exist_ok=True)
        for file in Path(folder).iterdir():
            shutil.move(file, out / file.name)
    return out / PAGE


def _block(
    path: str, found: Concepts, images: Sequence[NDArray[np.uint8]], names: Sequence[str], folder: Path, seed: int
) -> Iterator[_Picture]:
    figures = load_figures()
    stem = path.replace(".", "-") or "block"
    attention, states, edges, updated = (None if x is None else x.detach().float().cpu() for x in found)
    assert attention is not None
    assert states is not None
    assert updated is not None
    concepts, height, width = attention.shape[1:]
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        file = f"{stem}-attention-{i}.png"
        figures.attention_figure(image, attention[i]).savefig(folder / file)
        yield _Picture(
            file,
            f"{concepts} attention maps over {name}",
            f"{name}: where each of {concepts} concepts looks, {height} × {width} positions. Beside a concept's number "
            "stands its highest attention as a multiple of uniform attention.",
        )
    if edges is not None:
        same = bool((edges == edges[:1]).all())
        shown = edges[:1] if same else edges[: figures.MOST_PANELS]
        file = f"{stem}-edges.png"
        titles = ["all images"] if same else list(names[: len(shown)])
        figures.edges_figure(shown, titles).savefig(folder / file)
        more = f" The first {len(shown)} of {len(names)} images." if not same and len(shown) < len(names) else ""
        yield _Picture(
            file,
            f"edges between concepts of {path}",
            f"Edges: how much a concept (row) takes from another (column).{more}",
        )
    for kind, x in (("sampled", states), ("updated", updated)):
        try:
            places = figures.embed(x.flatten(0, 1), seed)
        except ValueError:
            continue
        file = f"{stem}-states-{kind}.png"
        figures.states_figure(places, concepts).savefig(folder / file)
        when = "before the exchange" if kind == "sampled" else "after the exchange"
        yield _Picture(
            file,
            f"t-SNE of {kind} states of {path}",
            f"t-SNE of the {len(places)} concept states {when}, a point per image and concept; numbers stand at a "
            "concept's median.",
        )


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; }
nav { position: sticky; top: 0; background: Canvas; padding: .5rem 0; border-bottom: 1px solid GrayText; z-index: 1; }
nav a { margin-right: 1rem; white-space: nowrap; }
section { scroll-margin-top: 4rem; }
figure { margin: 1rem 0 2rem; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
figcaption { font-size: .9rem; }
"""


def _page(title: str, seen: Mapping[str, Concepts], sections: Mapping[str, Sequence[_Picture]]) -> str:
    def label(path: str) -> str:
        return html.escape(path or "block")

    def anchor(path: str) -> str:
        return html.escape("block-" + path.replace(".", "-"), quote=True)

    links = "".join(f'<a href="#{anchor(path)}">{label(path)}</a>' for path in sections)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f"<nav>{links}</nav>",
    ]
    for path, pictures in sections.items():
        n, concepts, width = seen[path].states.shape
        parts.append(f'<section id="{anchor(path)}"><h2>{label(path)}</h2>')
        parts.append(f"<p>{n} images, {concepts} concepts, states of {width} numbers.</p>")
        for file, alt, caption in pictures:
            source, text = html.escape(file, quote=True), html.escape(alt, quote=True)
            parts.append(f'<figure><img src="{source}" alt="{text}" loading="lazy">')
            parts.append(f"<figcaption>{html.escape(caption)}</figcaption></figure>")
        parts.append("</section>")
    return "\n".join([*parts, "</body></html>", ""])

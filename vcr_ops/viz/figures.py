"""The three kinds of figures: attention maps over an image, edges between concepts, states in the plane."""

from collections.abc import Sequence
from math import ceil

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor

COLUMNS = 8
MOST_PANELS = 12


def figure(width: float, height: float) -> Figure:
    """Inches; not pyplot's, so that nothing global is touched."""
    made = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(made)
    return made


def attention_figure(image: NDArray[np.uint8], attention: Tensor) -> Figure:
    """image (H, W, 3); attention (C, h, w), each concept's over the image, coloured by its share of its maximum.

    Beside a concept's number stands its maximum in terms of uniform attention.
    """
    concepts, height, width = attention.shape
    rows = ceil(concepts / COLUMNS)
    fig = figure(1.35 * COLUMNS + 0.7, 1.5 * rows * image.shape[0] / image.shape[1] + 0.2)
    axes = fig.subplots(rows, min(COLUMNS, concepts), squeeze=False).ravel()
    grey = image.mean(2) / 255 * 0.75 + 0.2
    top = attention.flatten(1).amax(1)
    share = attention / top.clamp_min(torch.finfo(attention.dtype).tiny)[:, None, None]
    large = F.interpolate(share[None], image.shape[:2], mode="bilinear", align_corners=False)[0]
    drawn = None
    for c, ax in enumerate(axes):
        ax.axis("off")
        if c >= concepts:
            continue
        values = large[c].numpy()
        ax.imshow(grey, cmap="gray", vmin=0, vmax=1)
        drawn = ax.imshow(values, cmap="inferno", vmin=0, vmax=1, alpha=0.1 + 0.55 * np.sqrt(np.clip(values, 0, 1)))
        ax.set_title(f"{c}: {float(top[c]) * height * width:.1f}×", fontsize=8, pad=2)
    assert drawn is not None
    bar = fig.colorbar(drawn, ax=axes.tolist(), shrink=0.8, aspect=30, pad=0.01)
    bar.set_label("attention / its maximum", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return fig


def edges_figure(edges: Tensor, names: Sequence[str]) -> Figure:
    """edges (panels, C, C): row takes from column. One colour scale for all, symmetric about 0."""
    panels, concepts, _ = edges.shape
    columns = min(4, panels)
    rows = ceil(panels / columns)
    fig = figure(2.7 * columns + 0.8, 2.85 * rows + 0.3)
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    most = max(float(edges.abs().max()), 1e-12)
    ticks = range(0, concepts, max(1, concepts // 4))
    drawn = None
    for i, ax in enumerate(axes):
        if i >= panels:
            ax.axis("off")
            continue
        drawn = ax.imshow(edges[i].numpy(), cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
        ax.set_title(names[i], fontsize=9)
        ax.set_xticks(list(ticks))
        ax.set_yticks(list(ticks))
        ax.tick_params(labelsize=7)
        ax.set_xlabel("from concept", fontsize=8)
        ax.set_ylabel("to concept", fontsize=8)
    assert drawn is not None
    bar = fig.colorbar(drawn, ax=axes.tolist(), shrink=0.8, aspect=30, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    return fig


def embed(states: Tensor, seed: int) -> NDArray[np.float64]:
    """states (points, width) to (points, 2) by t-SNE, columns standardised. Perplexity 30, or less for few points.

    Raises:
        ValueError: fewer than 4 points, or all the same: there is nothing to lay out.
    """
    points = states.double().numpy()
    spread = points.std(0)
    if len(points) < 4 or not np.any(spread > 0):
        raise ValueError(f"t-SNE takes at least 4 states that differ; these are {len(points)}, or all the same")
    points = (points - points.mean(0))[:, spread > 0] / spread[spread > 0]
    start = "pca" if points.shape[1] > 1 else "random"
    with threadpool_limits(1):  # so few points that threads would only wait for each other
        return TSNE(perplexity=min(30.0, (len(points) - 1) / 3), init=start, random_state=seed).fit_transform(points)


def states_figure(places: NDArray[np.float64], concepts: int) -> Figure:
    """places (N*C, 2), a colour and a number for each of C concepts."""
    fig = figure(7.6, 6)
    ax = fig.subplots()
    colours = matplotlib.colormaps["gist_rainbow"](np.linspace(0, 1, concepts, endpoint=False))
    concept = np.arange(len(places)) % concepts
    for c in range(concepts):
        mine = places[concept == c]
        ax.scatter(mine[:, 0], mine[:, 1], s=22, color=colours[c], edgecolor="black", linewidth=0.3, label=str(c))
        x, y = np.median(mine, axis=0)
        ax.annotate(str(c), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    ax.set_xticks([])
    ax.set_yticks([])
    fig.legend(loc="outside right upper", ncols=ceil(concepts / 24), fontsize=6, title="concept", title_fontsize=7)
    return fig

"""The paper's figures as pure functions that return PIL images. matplotlib is imported on use, without global state."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from open_gem.errors import InputError
from open_gem.images.colors import label_color
from open_gem.method.kmeans import spherical_kmeans
from open_gem.paper.clustering import block_order, components, self_self_clustering

MOST_PANELS, MOST_POINTS = 16, 1000  # along a side of the figure; in each panel
PANEL, MARGIN, HEADER, DPI = (3.3, 1.95), 0.75, 1.15, 120  # inches (width, height), inches, inches, pixels an inch
INK, FAINT, EDGE = "#222222", "#8a8a8a", "#d5d5d5"


class _Panel(NamedTuple):
    """One clustering: its name, where each point went `(n, c)`, the attention matrix `(n, n)`, labels `(n,)`, and an
    order of the points `(n,)`."""

    name: str
    moved: Tensor
    attention: Tensor
    labels: Tensor
    order: Tensor


class _Basis(NamedTuple):
    """Principal components of points: `center` `(c,)`, `axes` `(c, 3)`, `reach` `(3,)` how far points go on each."""

    center: Tensor
    axes: Tensor
    reach: Tensor

    def __call__(self, points: Tensor) -> np.ndarray:
        """Return places `(n, 3)`, −1 to 1 for the points the basis was fitted on."""
        return ((points - self.center) @ self.axes / self.reach).numpy()


def clustering_figure(
    points: Tensor,
    iterations: Sequence[int] = (1, 3, 10),
    temperatures: Sequence[float] = (0.1, 0.2, 0.3, 0.5),
    clusters: Sequence[int] = (10, 7, 4, 2),
    seed: int = 0,
) -> Image.Image:
    """Draw self-self attention beside k-means on points `(n, c)` (paper Fig. 7; a part of it is Fig. 2).

    There is a row for each number of iterations K and a column for each temperature τ; the last row is k-means, from
    `seed`, for each number of clusters. A panel shows the points p^0 on their first two principal components. The
    colour of a point is where it went, p^K or the direction of its cluster: the first three principal components as
    red, green and blue. All panels share both maps. Beside it is the n×n attention matrix (for k-means 1 / size within
    a cluster), its rows ordered into blocks, its colours proportional to square roots. Clusters of self-self attention
    are those of `components`.

    Raises InputError for a side of the grid that is empty or above 16, more than 1000 points, and settings that
    `self_self_clustering` or `spherical_kmeans` refuses.
    """
    sides = {"iterations": iterations, "temperatures": temperatures, "clusters": clusters}
    for name, side in sides.items():
        if not 1 <= len(side) <= MOST_PANELS:
            raise InputError(
                f"{len(side)} {name} given, expected 1 to {MOST_PANELS}, one a row or column of the figure"
            )
    if points.ndim != 2 or not 1 <= len(points) <= MOST_POINTS:
        raise InputError(
            f"points have shape {tuple(points.shape)}, expected (points, width), 1 to {MOST_POINTS} points"
        )
    start = normalize(points.detach().cpu().double(), dim=-1)
    rows = [[_self_self_panel(start, count, temperature) for temperature in temperatures] for count in iterations]
    rows.append([_kmeans_panel(start, count, seed) for count in clusters])
    titles = [("self-self attention", f"K = {count}") for count in iterations] + [("by cosine", "k-means")]
    return _draw(rows, titles, start)


def plot(
    series: Mapping[str, Sequence[tuple[float, tuple[float, float, float]]]], title: str = "", axis: str = ""
) -> Image.Image:
    """Draw curves with bands: each a list of (x, (value, low, high)). The x axis is logarithmic if it spans a factor of
    10.

    Raises InputError for no curve.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    xs = [x for points in series.values() for x, _ in points]
    if not xs:
        raise InputError("no curve given, expected one or more")
    figure = Figure(figsize=(6, 4), dpi=DPI, facecolor="white", layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    for index, (name, points) in enumerate(series.items()):
        x, color = [x for x, _ in points], np.array(label_color(index)) / 255
        value, low, high = (np.array(column) for column in zip(*(estimate for _, estimate in points), strict=True))
        axes.plot(x, value, marker="o", markersize=4, label=name, color=color)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    if min(xs) > 0 and max(xs) >= 10 * min(xs):
        axes.set_xscale("log")
    axes.set_title(title, loc="left", color=INK)
    axes.set_xlabel(axis, color=FAINT)
    axes.grid(color=EDGE, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


# Panels ---------------------------------------------------------------------------------------------------------------


def _self_self_panel(start: Tensor, iterations: int, temperature: float) -> _Panel:
    moved, attention = self_self_clustering(start, iterations, temperature)
    return _Panel(f"τ = {temperature:g}", moved, attention, components(moved), block_order(moved))


def _kmeans_panel(start: Tensor, clusters: int, seed: int) -> _Panel:
    labels, directions, _ = spherical_kmeans(start, clusters, seed=seed, iterations=100)
    member = one_hot(labels, clusters).to(start.dtype)
    attention = member / member.sum(dim=0) @ member.T
    return _Panel(f"k = {clusters}", directions[labels], attention, labels, labels.argsort(stable=True))


def _principal(points: Tensor) -> _Basis:
    """Fit three principal components; missing ones are 0. The largest entry of each is positive, since a decomposition
    does not determine signs."""
    center = points.mean(dim=0)
    axes = torch.zeros(points.shape[1], 3, dtype=points.dtype, device=points.device)
    principal = torch.linalg.svd(points - center, full_matrices=False).Vh[:3].T
    largest = principal.gather(0, principal.abs().argmax(dim=0, keepdim=True))
    axes[:, : principal.shape[1]] = principal * torch.ones_like(largest).masked_fill_(largest < 0, -1)
    reach = ((points - center) @ axes).abs().amax(dim=0)
    return _Basis(center, axes, torch.where(reach > 1e-9, reach, 1.0))


def _colors(places: np.ndarray) -> np.ndarray:
    """Return places `(n, 3)` from −1 to 1 as colours `(n, 3)` that differ from the background and from ink."""
    return 0.48 + 0.4 * np.clip(places, -1, 1)


# Drawing --------------------------------------------------------------------------------------------------------------


def _draw(rows: list[list[_Panel]], titles: list[tuple[str, str]], start: Tensor) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(map(len, rows))
    width, height = MARGIN + columns * PANEL[0], HEADER + len(rows) * PANEL[1]
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    basis = _principal(start)
    places = basis(start)[:, :2]

    def box(left: float, top: float, side: float = 1.4) -> Any:  # inches from the top left corner
        return figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))

    for index, (panels, (title, subtitle)) in enumerate(zip(rows, titles, strict=True)):
        top = HEADER + index * PANEL[1]
        middle = 1 - (top + 0.25 + 0.7) / height
        figure.text(0.25 / width, middle, title, rotation=90, ha="center", va="center", color=FAINT, size=9)
        figure.text(0.5 / width, middle, subtitle, rotation=90, ha="center", va="center", color=INK, size=12)
        for column, panel in enumerate(panels):
            left = MARGIN + column * PANEL[0]
            count = int(panel.labels.max()) + 1
            name = f"{panel.name}:  {count} cluster{'s' if count > 1 else ''}"
            figure.text((left + 1.475) / width, 1 - (top + 0.12) / height, name, ha="center", va="center", color=INK)
            _scatter(box(left, top + 0.25), places, _colors(basis(panel.moved)))
            _matrix(box(left + 1.55, top + 0.25), panel)
    figure.text(0.25 / width, 1 - 0.3 / height, "Self-self attention is clustering", size=15, va="center", color=INK)
    what = f"{len(start)} vectors of width {start.shape[1]}"
    about = f"{what}, coloured by where they go;\nbeside them, who attends to whom"
    figure.text(0.25 / width, 1 - 0.52 / height, about, size=9, va="top", linespacing=1.4, color=FAINT)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _scatter(axes: Any, places: np.ndarray, colors: np.ndarray) -> None:
    size = float(np.clip(1500 / len(places), 6, 60))
    axes.scatter(*places.T, s=size, c=colors, edgecolors="white", linewidths=0.5)
    axes.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), xticks=[], yticks=[])
    axes.spines[:].set_color(EDGE)


def _matrix(axes: Any, panel: _Panel) -> None:
    ordered = panel.attention[panel.order][:, panel.order].numpy()
    axes.imshow(np.sqrt(ordered), cmap="BuPu", vmin=0, vmax=np.sqrt(ordered.max()), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(EDGE)

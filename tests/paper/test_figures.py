"""The clustering figure, checked on pixels, and the command that draws it."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor
from typer.testing import CliRunner, Result

from open_gem import cli
from open_gem.cli import save
from open_gem.errors import InputError
from open_gem.method.kmeans import spherical_kmeans
from open_gem.paper import figures
from open_gem.paper.clustering import components, random_vectors, self_self_clustering
from open_gem.paper.figures import clustering_figure


def inches(pixels: np.ndarray, left: float, top: float, side: float = 1.4) -> np.ndarray:
    """A square of the figure."""
    return pixels[round(top * figures.DPI) :, round(left * figures.DPI) :][: round(side * figures.DPI)][
        :, : round(side * figures.DPI)
    ]


def panel(picture: Image.Image, row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
    """The scatter and the matrix at this place, as pixels."""
    pixels = np.asarray(picture)
    left, top = figures.MARGIN + column * figures.PANEL[0], figures.HEADER + row * figures.PANEL[1] + 0.25
    return inches(pixels, left, top), inches(pixels, left + 1.55, top)


def dot_colors(scatter: np.ndarray) -> set[tuple[int, ...]]:
    """The colours of dots: those that fill areas, but for the ground and what is blended with it at edges."""
    found, counts = np.unique(scatter[4:-4, 4:-4].reshape(-1, 3), axis=0, return_counts=True)
    colors = zip(found.tolist(), counts, strict=True)
    return {tuple(color) for color, count in colors if count >= 20 and max(color) <= 225}


def cells(matrix: np.ndarray, count: int) -> np.ndarray:
    """The colour in the middle of each cell of a drawn count × count matrix."""
    middles = ((np.arange(count) + 0.5) / count * len(matrix)).astype(int)
    return matrix[np.ix_(middles, middles)].astype(int)


def expected_cells(attention: Tensor) -> np.ndarray:
    return matplotlib.colormaps["BuPu"](np.sqrt(attention.numpy() / attention.max().item()), bytes=True)[..., :3]


# Pictures -------------------------------------------------------------------------------------------------------------


def test_kmeans_panels_show_as_many_colors_and_blocks_as_clusters():
    points = random_vectors(12, 16)
    picture = clustering_figure(points, (1,), (0.1,), (4, 2, 1), seed=3)
    for column, clusters in enumerate((4, 2, 1)):
        scatter, matrix = panel(picture, 1, column)
        assert len(dot_colors(scatter)) == clusters
        sizes = spherical_kmeans(points, clusters, seed=3, iterations=100).labels.bincount()
        attention = torch.block_diag(*(torch.full((size, size), 1 / size) for size in sizes.tolist()))
        assert abs(cells(matrix, 12) - expected_cells(attention)).max() <= 2


@pytest.mark.parametrize(("iterations", "temperature"), [(0, 0.2), (3, 0.3), (10, 0.3)])
def test_self_self_panels_show_the_attention_matrix_in_blocks(iterations: int, temperature: float):
    points = random_vectors(12, 16)
    picture = clustering_figure(points, (1, iterations), (0.1, temperature), (3,))
    moved, attention = self_self_clustering(points, iterations, temperature)
    order = figures.block_order(moved)
    _, matrix = panel(picture, 1, 1)
    assert abs(cells(matrix, 12) - expected_cells(attention[order][:, order])).max() <= 2


def test_points_with_the_same_destination_have_the_same_color():
    points = random_vectors(20, 16)
    picture = clustering_figure(points, (0, 3, 60), (0.2, 1.0), (2,))
    assert len(dot_colors(panel(picture, 0, 0)[0])) == 20
    assert len(dot_colors(panel(picture, 2, 1)[0])) == 1
    labels = components(self_self_clustering(points, 60, 0.2).moved)
    assert len(dot_colors(panel(picture, 2, 0)[0])) == len(labels.unique()) > 1


def test_places_and_colors_are_the_same_in_all_panels():
    """Dots stay where they are; where nothing moves, k-means with a cluster a point, colours do so too."""
    points = random_vectors(8, 16)
    picture = clustering_figure(points, (0, 10), (0.1, 0.5), (8,))
    places = [(panel(picture, row, column)[0] < 250).any(axis=-1) for row, column in product(range(2), range(2))]
    assert all((place == places[0]).mean() > 0.995 for place in places)
    assert dot_colors(panel(picture, 0, 0)[0]) == dot_colors(panel(picture, 2, 0)[0])


def test_principal_components_equal_scikit_learns():
    points = random_vectors(20, 16)
    basis = figures._principal(points)
    theirs = PCA(3).fit(points.numpy())
    ours, expected = basis.axes.T.numpy(), theirs.components_
    signs = np.sign((ours * expected).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(ours, signs * expected, atol=1e-9)
    other = random_vectors(5, 16, seed=1)
    np.testing.assert_allclose(basis(other) * basis.reach.numpy(), theirs.transform(other.numpy()) * signs.T, atol=1e-9)
    assert abs(basis(points)).max(axis=0) == pytest.approx([1, 1, 1])
    assert all(axis[abs(axis).argmax()] > 0 for axis in ours)


@pytest.mark.parametrize("grid", [((1,), (0.1,), (2,)), ((1, 2, 3, 4), (0.2,), (3, 2)), ((2,), (0.1, 0.2, 1), (4,))])
def test_a_grid_of_any_shape_is_drawn(grid):
    iterations, temperatures, clusters = grid
    picture = clustering_figure(random_vectors(6, 4), *grid)
    assert picture.mode == "RGB"
    columns, rows = max(len(temperatures), len(clusters)), len(iterations) + 1
    width, height = figures.MARGIN + columns * figures.PANEL[0], figures.HEADER + rows * figures.PANEL[1]
    assert abs(np.array(picture.size) - np.array([width, height]) * figures.DPI).max() <= 1
    for row, column in product(range(rows), range(columns)):
        filled = column < len(clusters if row == rows - 1 else temperatures)
        assert all((part < 255).any() == filled for part in panel(picture, row, column))
    edges = np.asarray(picture)
    assert all((edge == 255).all() for edge in (edges[0], edges[-1], edges[:, 0], edges[:, -1]))  # nothing is cut off


@pytest.mark.parametrize(
    "points",
    [torch.ones(1, 1), torch.ones(5, 3), torch.zeros(4, 3), random_vectors(6, 1), random_vectors(4, 2).bfloat16()],
    ids=["one", "alike", "zeros", "width 1", "half"],
)
def test_degenerate_points_are_drawn(points: Tensor):
    assert clustering_figure(points, (0, 2), (0.1,), (1,)).size[1] > 0


def test_many_points_are_drawn():
    picture = clustering_figure(random_vectors(300, 8), (1,), (0.1,), (4,))
    assert len(dot_colors(panel(picture, 1, 0)[0])) >= 4


def test_drawing_is_deterministic():
    points, grid = random_vectors(8), ((1,), (0.3,), (3,))
    state = torch.get_rng_state()
    assert clustering_figure(points, *grid, seed=1) == clustering_figure(points, *grid, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"iterations": ()}, "0 iterations given, expected 1 to 16"),
        ({"temperatures": [0.1] * 17}, "17 temperatures given"),
        ({"clusters": []}, "0 clusters given"),
        ({"clusters": (7,)}, "clusters is 7, expected a whole number from 1 to 6"),
        ({"iterations": (-1,)}, "iterations is -1"),
        ({"temperatures": (0.0,)}, "temperature is 0"),
        ({"points": torch.zeros(2, 3, 4)}, r"shape \(2, 3, 4\)"),
        ({"points": torch.zeros(1001, 2)}, r"shape \(1001, 2\)"),
        ({"points": torch.full((6, 2), torch.nan)}, "not a number"),
    ],
)
def test_impossible_figures_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        clustering_figure(**{"points": random_vectors(6, 4), "clusters": (2,), **arguments})


# The command ----------------------------------------------------------------------------------------------------------

SMALL = ("--iterations", "1,4", "--temperatures", "0.2,1", "--clusters", "3, 2", "--vectors", "9", "--width", "5")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["clusters", *map(str, arguments)])


def test_clusters_draws_the_figure_and_counts(place: Path):
    result = call(*SMALL, "--seed", 4, "--out", "made/here.png")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert [path.name for path in (place / "made").iterdir()] == ["here.png"]
    points = random_vectors(9, 5, seed=4)
    with Image.open("made/here.png") as drawn:
        expected = clustering_figure(points, (1, 4), (0.2, 1.0), (3, 2), seed=4)
        assert np.array_equal(np.asarray(drawn), np.asarray(expected))
    counts = [
        [count, *(len(components(self_self_clustering(points, count, at).moved).unique()) for at in (0.2, 1.0))]
        for count in (1, 4)
    ]
    rows = [[int(cell) for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if line[:1] == "│"]
    assert rows == counts
    for words in ("τ = 0.2", "τ = 1", "made/here.png", "3, 2 clusters"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--iterations", "1,x"], "iterations is '1,x', expected comma-separated whole numbers such as 1,3"),
        (["--iterations", ""], "iterations is ''"),
        (["--iterations", "1.5"], "iterations is '1.5'"),
        (["--iterations", "-1"], "iterations is -1"),
        (["--temperatures", "0.1;0.2"], "temperatures is '0.1;0.2', expected comma-separated numbers"),
        (["--temperatures", "nan"], "temperature is nan"),
        (["--temperatures", "0"], "temperature is 0.0"),
        (["--clusters", "2,"], "clusters is '2,'"),
        (["--clusters", "10"], "clusters is 10, expected a whole number from 1 to 9"),
        (["--vectors", "0"], "count of vectors is 0"),
        (["--vectors", "2000"], "shape (2000, 5)"),
        (["--width", "-3"], "width of vectors is -3"),
        (["--seed", "-1"], "seed is -1"),
        (["--out", "clusters.jpg"], "--out is 'clusters.jpg', expected a name that ends in .png"),
        (["--out", "folder.png"], "cannot write 'folder.png'"),
        (["--out", "file.txt/clusters.png"], "cannot write to 'file.txt'"),
    ],
)
def test_clusters_refuses_impossible_options(arguments: list[str], words: str, place: Path):
    (place / "folder.png").mkdir()
    (place / "file.txt").touch()
    result = call(*SMALL, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and words in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert {path.name for path in place.iterdir()} == {"folder.png", "file.txt"}


def test_no_partial_file_is_left(place: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Image.Image, file, format: str) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save.Image.Image, "save", fail)
    result = call(*SMALL)
    assert (result.exit_code, result.stderr) == (2, "error: cannot write 'clusters.png': No space left on device\n")
    assert not list(place.iterdir())


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.argv = {['open-gem', 'clusters', *arguments]!r}\nfrom open_gem import cli\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_clusters_runs_without_network_or_pyplot(place: Path):
    code = (
        "import socket; socket.socket.connect = None\n"
        "try: cli.main()\n"
        "except SystemExit as error: sys.exit('matplotlib.pyplot' in sys.modules or error.code)"
    )
    ended = run(code)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "τ = 0.5" in ended.stdout and "10, 7, 4, 2 clusters" in ended.stdout
    with Image.open(place / "clusters.png") as drawn:
        assert drawn.size[0] > 1000 and drawn.size[1] > 800


def test_help_is_quick():
    ended = run(
        "try: cli.main()\nfinally: print('woke', {'torch', 'scipy', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules))",
        "--help",
    )
    assert "--temperatures" in ended.stdout
    assert "woke set()" in ended.stdout

"""`open-gem clusters`: the paper's simulation, self-self attention beside k-means on random vectors."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from open_gem.cli.app import app, new_console, new_table
from open_gem.cli.options import parse_numbers
from open_gem.errors import InputError


@app.command()
def clusters(
    out: Annotated[Path, typer.Option(help="File for the figure, a PNG.")] = Path("clusters.png"),
    iterations: Annotated[
        str, typer.Option(help="K, comma-separated: steps of self-self attention, a row each.")
    ] = "1,3,10",
    temperatures: Annotated[str, typer.Option(help="τ, comma-separated: a column each.")] = "0.1,0.2,0.3,0.5",
    clusters: Annotated[str, typer.Option(help="k of k-means, comma-separated: the last row.")] = "10,7,4,2",
    vectors: Annotated[int, typer.Option(help="Number of vectors.")] = 20,
    width: Annotated[int, typer.Option(help="Dimensions of a vector.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the vectors and of k-means.")] = 0,
) -> None:
    """Draw how self-self attention makes clusters of random vectors, beside k-means (Figs. 2, 7). Needs no network."""
    from open_gem.cli.save import save_image
    from open_gem.files import check_writable
    from open_gem.paper.clustering import components, random_vectors, self_self_clustering
    from open_gem.paper.figures import clustering_figure

    if out.suffix.lower() != ".png":
        raise InputError(f"--out is {str(out)!r}, expected a name that ends in .png")
    steps = parse_numbers("iterations", iterations, int)
    degrees = parse_numbers("temperatures", temperatures)
    sizes = parse_numbers("clusters", clusters, int)
    check_writable(out.parent)
    points = random_vectors(vectors, width, seed)
    save_image(out, clustering_figure(points, steps, degrees, sizes, seed))

    table = new_table("iterations", *(f"τ = {degree:g}" for degree in degrees), title="clusters by self-self attention")
    for count in steps:
        assignments = [components(self_self_clustering(points, count, degree).moved) for degree in degrees]
        table.add_row(str(count), *(str(int(labels.max()) + 1) for labels in assignments))
    console = new_console()
    console.print(table)
    console.print(Text(f"Look at {out}; its last row is k-means with {', '.join(map(str, sizes))} clusters"))

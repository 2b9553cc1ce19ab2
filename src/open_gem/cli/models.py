"""`open-gem models` and `open-gem methods`: the tables of both, and the check of a model against its library."""

from collections import Counter
from typing import Annotated, Any

import typer
from rich.text import Text

from open_gem.cli.app import app, new_console, new_table, print_json, say
from open_gem.cli.options import DeviceOption, DtypeOption, JsonOption
from open_gem.errors import InputError

BENCHMARKS = ("VOC", "Context", "ADE20K")


@app.command()
def models(
    every: Annotated[
        bool, typer.Option("--all", help="Every name and tag of open_clip, and whether it is supported.")
    ] = False,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="Which model should I use? A short list with size, speed and licence.")
    ] = False,
    check: Annotated[
        list[str] | None,
        typer.Option(
            help='Compare this architecture, with random weights, with its own library (repeatable); or "all".'
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """List the supported families of models, or check that one is read exactly.

    A check downloads no weights: it compares the tokens and pooled output of a randomly initialised model with the
    library's own forward pass, on square and other images. In a type other than float32 it also shows what the type
    costs each method.
    """
    if bool(check) + every + recommend > 1:
        raise InputError("--all, --recommend and --check exclude each other: give one of them")
    if not check and (dtype, device) != ("float32", "cpu"):
        raise InputError("--dtype and --device are for --check")
    if check:
        _check(check, dtype, device, as_json)
    elif every:
        _list_names(as_json)
    elif recommend:
        _recommend(as_json)
    else:
        _list_families(as_json)


def _list_families(as_json: bool) -> None:
    from open_gem.towers.loading import EMBEDDED, FAMILIES

    rows: list[dict[str, Any]] = [
        {
            "family": EMBEDDED,
            "library": "open_clip",
            "examples": [[EMBEDDED, None]],
            "about": "small, in the package, no download: for trying out and for tests",
            "tested": "on scenes, see its card",
        }
    ]
    for row in FAMILIES:
        rows.append(
            {
                "family": row.name,
                "library": row.library,
                "examples": [list(example) for example in row.examples],
                "about": row.about,
                "tested": row.tested,
            }
        )
    if as_json:
        print_json(rows)
        return
    table = new_table("family", "library", "examples", "about", "tested")
    for row in rows:
        examples = "\n".join(", ".join(filter(None, example)) for example in row["examples"])
        table.add_row(*map(Text, (row["family"], row["library"], examples, row["about"], row["tested"])))
    console = new_console()
    console.print(table)
    console.print(Text("Which one? --recommend. All names: --all. Against their library's own forward: --check NAME."))
    console.print(
        Text(
            "To compare with, open-gem ground --model also takes GroupViT, CLIPSeg, OWLv2, OWL-ViT, "
            "Grounding DINO and SAM 3."
        )
    )


def _list_names(as_json: bool) -> None:
    from open_gem.towers.loading import list_models

    rows = list_models()
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    table = new_table("name", "tag", "library", "family", "cannot be read because")
    for row in rows:
        table.add_row(*(Text(value or "") for value in row))
    console = new_console()
    console.print(table)
    architectures = {row.name: row for row in rows if row.library == "open_clip"}.values()
    refused = Counter(row.unsupported_reason for row in architectures if row.unsupported_reason)
    read = Counter(row.family for row in architectures if not row.unsupported_reason)
    for title, counts in (("can be read", read), ("cannot", refused)):
        console.print(Text(f"{counts.total()} of open_clip's {len(architectures)} architectures {title}:"))
        for what, count in counts.most_common():
            console.print(Text(f"  {count:3} {what}"))


def _recommend(as_json: bool) -> None:
    from open_gem.towers.choices import CHOICES

    if as_json:
        print_json(
            [
                row._asdict()
                | {"download_mb": row.download, "published": dict(zip(BENCHMARKS, row.published, strict=True))}
                for row in CHOICES
            ]
        )
        return
    columns = ("model", "download", "patch", "time", *BENCHMARKS, "licence", "about")
    table = new_table(*columns, title="Which model should I use?")
    for row in CHOICES:
        published = ("–" if value is None else f"{value:.1f}" for value in row.published)
        sizes = (f"{row.download} MB", str(row.patch), f"{row.relative_time:.2g} ×")
        table.add_row(*map(Text, (f"{row.name}, {row.tag}", *sizes, *published, row.licence, row.about)))
    console = new_console()
    console.print(table)
    for line in (
        "time: GEM on 448×448 pixels, relative to ViT-B/16 (random weights, two CPU cores). download: four bytes a "
        "parameter.",
        "VOC, Context, ADE20K: published mIoU of GEM in percent (table 4 of its paper; ADE20K by ClearCLIP's authors).",
        'Use one: open-gem ground cat.jpg -p "a cat" --model ViT-B-16 --pretrained openai',
    ):
        console.print(Text(line))


def _check(names: list[str], dtype: str, device: str, as_json: bool) -> None:
    import torch

    from open_gem.towers.check import check, random_images, rounding, sizes_of
    from open_gem.towers.loading import FAMILIES, build_tower, find_device, find_dtype

    place = find_device(device)
    kind = find_dtype(dtype, place)
    if "all" in names:
        names = ["embedded", *(row.examples[0][0] for row in FAMILIES)]
    failed, documents = False, []
    for name in dict.fromkeys(names):
        tower = build_tower(name)
        tower.module.to(place)
        costs = [] if kind == torch.float32 else rounding(tower, kind, random_images(sizes_of(tower)[1]))
        tower.module.to(kind)
        differences = check(tower)
        fine = all(row.fits(kind) for row in differences)
        failed |= not fine
        document = {
            "name": name,
            "dtype": str(kind).removeprefix("torch."),
            "equal": fine,
            "differences": [row._asdict() for row in differences],
            "rounding": [row._asdict() for row in costs],
        }
        documents.append(document)
        if not as_json:
            _print_check(document)
    if as_json:
        print_json(documents)
    if failed:
        say("error: not equal to the library's own forward")
        raise typer.Exit(1)


def _print_check(document: dict[str, Any]) -> None:
    console = new_console()
    title = f"{document['name']}, {document['dtype']}: difference from the library, as a share of its largest value"
    table = new_table("height × width", "blocks through", "tokens", "pooled", title=title)
    for row in document["differences"]:
        through = "the library's modules" if row["exact"] else "fused kernels"
        table.add_row("{} × {}".format(*row["size"]), through, f"{row['tokens']:.1e}", f"{row['pooled']:.1e}")
    console.print(table)
    if document["rounding"]:
        title = f"{document['name']}: what {document['dtype']} costs, 1 − cosine with float32"
        table = new_table("method", "patches, mean", "patches, worst", "pooled, mean", title=title)
        for row in document["rounding"]:
            table.add_row(row["method"], *(f"{row[key]:.1e}" for key in ("mean", "worst", "pooled")))
        console.print(table)


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the methods, with their attention and settings."""
    from open_gem.method.table import GRADIENTS, METHODS

    known = METHODS | GRADIENTS
    rows = [{"name": name, **row.describe(), "about": row.about} for name, row in known.items()]
    if as_json:
        print_json(rows)
        return
    table = new_table("name", "about", "attention", "depth", "residual", "mlp", "other settings")
    for name, method in known.items():
        table.add_row(*map(Text, (name, method.about, *_cells(method.describe()))))
    console = new_console()
    console.print(table)
    console.print("All settings as JSON: open-gem methods --json")


def _cells(settings: dict[str, Any]) -> tuple[str, ...]:
    """Return the name of a method's attention, and its settings."""
    shown = [_to_text(settings.pop(name)) for name in ("attention", "depth", "residual", "mlp")]
    others = (f"{name} {_to_text(value)}" for name, value in settings.items() if value is not None)
    return (*shown, ", ".join(others))


def _to_text(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)

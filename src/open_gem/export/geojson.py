"""GeoJSON: outlines in longitude and latitude of what was found in georeferenced tiles. Owns rasterio."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from open_gem.export.labelled import Labelled, LabelledImage, Object
from open_gem.export.output import Output, json_arrays


def write_geojson(found: Labelled, output: Output) -> None:
    """`objects.geojson`: a feature an object, WGS 84, along the edges of its pixels, holes included.

    A feature is a Polygon, of several parts a MultiPolygon; an object without a mask is its box. The tiles are opened
    for where they lie; an image that is none, or has another size now, is left out and told.
    """
    with json_arrays(output.folder / "objects.geojson", {"type": "FeatureCollection"}, "features") as (features,):
        for image in found:
            tile = _tile(image)
            if isinstance(tile, str):
                output.skip(image.id, tile)
                continue
            for one in image.objects:
                features.add(_feature(one, image, tile))


@dataclass(frozen=True)
class Tile:
    """Where an image lies: `transform` takes its pixels (x, y) to coordinates of `crs`."""

    transform: Any
    crs: Any


def _tile(image: LabelledImage) -> Tile | str:
    """The tile, or why the image is none."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(image.source) as raster:
                transform, crs, size = raster.transform, raster.crs, raster.shape
    except RasterioError as error:
        return f"cannot open its tile: {error}"
    if crs is None or transform.is_identity:
        return f"not georeferenced: {image.source}"
    if tuple(size) != tuple(image.size):
        sides = [f"{height}x{width}" for height, width in (size, image.size)]
        return f"its tile is {sides[0]} pixels now (height x width), {sides[1]} were labelled"
    return Tile(transform, crs)


def _feature(one: Object, image: LabelledImage, tile: Tile) -> dict[str, Any]:
    from rasterio.warp import transform_geom

    properties = {
        "label": one.name,
        "prompt": one.prompt,
        "score": one.score,
        "presence": one.presence,
        "image": image.id,
    }
    geometry = transform_geom(tile.crs, "EPSG:4326", _outline(one, tile), precision=9)  # a tenth of a millimetre
    return {"type": "Feature", "properties": properties, "geometry": geometry}


def _outline(one: Object, tile: Tile) -> Mapping[str, Any]:
    """In the coordinates of the tile."""
    from rasterio.features import shapes

    mask = one.mask()
    if mask is None:
        left, top, right, bottom = one.xyxy
        corners = [(left, top), (left, bottom), (right, bottom), (right, top), (left, top)]
        return {"type": "Polygon", "coordinates": [[tile.transform @ corner for corner in corners]]}
    # Connected by edges: rings of parts that meet at a corner would touch themselves otherwise.
    parts = [
        shape["coordinates"]
        for shape, _ in shapes(mask.astype(np.uint8), mask, connectivity=4, transform=tile.transform)
    ]
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts}

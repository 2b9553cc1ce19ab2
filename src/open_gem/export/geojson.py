"""GeoJSON: outlines of the objects in georeferenced tiles, in longitude and latitude. Owns rasterio."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from open_gem.export.labelled import Labelled, LabelledImage, Object
from open_gem.export.output import Output, json_arrays
from open_gem.label.reading import open_file
from open_gem.types import Size


def write_geojson(labelled: Labelled, output: Output) -> None:
    """Write `objects.geojson`: a feature for each object, WGS 84, along the edges of its pixels, holes included.

    A feature is a Polygon, of several parts a MultiPolygon; an object without a mask is its box. The tiles are opened
    for their transforms, and turned as EXIF says; an image that is no tile, or has another size now, is left out and
    reported.
    """
    with json_arrays(output.folder / "objects.geojson", {"type": "FeatureCollection"}, "features") as (features,):
        for image in labelled:
            tile = _tile(image)
            if isinstance(tile, str):
                output.skip(image.id, tile)
                continue
            for obj in image.objects:
                features.add(_feature(obj, image, tile))


@dataclass(frozen=True)
class Tile:
    """The place of an image: `transform` takes its pixels (x, y), upright, to coordinates of `crs`."""

    transform: Any
    crs: Any


def _tile(image: LabelledImage) -> Tile | str:
    """Return the tile, or why the image is none."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(image.source) as raster:
                transform, crs, size = raster.transform, raster.crs, Size(*raster.shape)
    except RasterioError as error:
        return f"cannot open its tile: {error}"
    if crs is None or transform.is_identity:
        return f"not georeferenced: {image.source}"
    turn = _turn(_orientation(image.source), size)
    if turn[0, 0] == 0:
        size = Size(size.width, size.height)
    if size != image.size:
        sides = [f"{height}x{width}" for height, width in (size, image.size)]
        return f"its tile is {sides[0]} pixels now (height x width), {sides[1]} were labelled"
    upright = np.reshape(transform, (3, 3)) @ turn
    return Tile(rasterio.Affine(*upright[:2].ravel().tolist()), crs)


_TURNS = {  # EXIF orientation -> how columns and rows of the file follow from x and y upright; 1 is upright
    2: ((-1, 0), (0, 1)),
    3: ((-1, 0), (0, -1)),
    4: ((1, 0), (0, -1)),
    5: ((0, 1), (1, 0)),
    6: ((0, 1), (-1, 0)),
    7: ((0, -1), (-1, 0)),
    8: ((0, -1), (1, 0)),
}


def _turn(orientation: int, size: Size) -> np.ndarray:
    """Return the matrix `(3, 3)` from upright pixels, as they were labelled, to pixels of the file, which the transform
    refers to.

    size  of the file's pixels as they are stored
    """
    turn = np.eye(3)
    turn[:2, :2] = _TURNS.get(orientation, np.eye(2))
    for axis, side in enumerate((size.width, size.height)):
        turn[axis, 2] = side if turn[axis].sum() < 0 else 0  # counted from the other end
    return turn


def _orientation(source: str) -> int:
    """Return the EXIF orientation, 1 (upright) by default. GDAL ignores it, so that its transform is of pixels as
    stored."""
    try:
        with warnings.catch_warnings(), open_file(source) as file:
            warnings.simplefilter("ignore")
            return Image.open(file).getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a tile that PIL cannot read, in place of the image that it could
        return 1


def _feature(obj: Object, image: LabelledImage, tile: Tile) -> dict[str, Any]:
    from rasterio.warp import transform_geom

    properties = {
        "label": obj.label,
        "prompt": obj.prompt,
        "score": obj.score,
        "confidence": obj.confidence,
        "presence": obj.presence,
        **({} if obj.mask_quality is None else {"mask_quality": obj.mask_quality}),
        "image": image.id,
    }
    geometry = transform_geom(
        tile.crs, "EPSG:4326", _outline(obj, image.size, tile), precision=9
    )  # a tenth of a millimetre
    return {"type": "Feature", "properties": properties, "geometry": geometry}


def _outline(obj: Object, size: Size, tile: Tile) -> Mapping[str, Any]:
    """Return the outline in the coordinates of the tile."""
    from rasterio.features import shapes

    mask = obj.mask
    if mask is None:
        left, top, right, bottom = obj.box
        mask = np.zeros(size, bool)
        mask[top:bottom, left:right] = True
    # Connected by edges: rings of parts that meet at a corner would touch themselves otherwise.
    parts = [
        shape["coordinates"]
        for shape, _ in shapes(mask.astype(np.uint8), mask, connectivity=4, transform=tile.transform)
    ]
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts}

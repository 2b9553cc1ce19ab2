"""COCO: instances, results and panoptic segmentation."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from open_gem.export.labelled import Labelled, LabelledImage, Object
from open_gem.export.maps import pixels
from open_gem.export.output import Output, json_array, json_arrays


def write_coco(found: Labelled, output: Output) -> None:
    """`instances.json` and `results.json`, as pycocotools' `COCO` and `loadRes` read them.

    Image ids count from 1 in the order of the parts, category ids are the label's position + 1. Masks are RLE; an
    object without one has `"segmentation": []` and the area of its box. Two keys are beyond COCO's: `score`, `prompt`.
    """
    head = {"info": {"description": "labelled by open_gem"}, "licenses": [], "categories": categories(found)}
    with ExitStack() as files:
        images, annotations = files.enter_context(
            json_arrays(output.folder / "instances.json", head, "images", "annotations")
        )
        results = files.enter_context(json_array(output.folder / "results.json"))
        count = 0
        for number, image in enumerate(found, start=1):
            images.add(_image(image, number))
            for one in image.objects:
                count += 1
                annotations.add(_annotation(one, number, count))
                results.add(_result(one, number))


def write_panoptic(found: Labelled, output: Output) -> None:
    """`panoptic.json` and one PNG an image in `panoptic/`, whose id at a pixel is red + 256 green + 65536 blue.

    Where objects overlap, `maps.pixels` says which has the pixel; one that has no pixel left, or no mask, is left out.
    Ids of segments count from 1 in each image; 0 is no segment.
    """
    head = {"info": {"description": "labelled by open_gem"}, "licenses": [], "categories": categories(found)}
    with json_arrays(output.folder / "panoptic.json", head, "images", "annotations") as (images, annotations):
        for number, image in enumerate(found.each("labelmap"), start=1):
            path = output.place("panoptic", image.id, ".png")
            if path is None:
                continue
            _, ids = pixels(image)
            _save_ids(path, ids)
            images.add(_image(image, number))
            name = path.relative_to(output.folder / "panoptic").as_posix()
            annotations.add({"image_id": number, "file_name": name, "segments_info": _segments(image, ids)})


def categories(found: Labelled) -> list[dict[str, Any]]:
    return [
        {"id": number, "name": label, "supercategory": "", "isthing": 1}
        for number, label in enumerate(found.labels, start=1)
    ]


def _image(image: LabelledImage, number: int) -> dict[str, Any]:
    return {"id": number, "file_name": image.id, "height": image.size.height, "width": image.size.width}


def _result(one: Object, image_id: int) -> dict[str, Any]:
    result = {"image_id": image_id, "category_id": one.label + 1, "bbox": one.xywh, "score": one.score}
    return result if one.rle is None else {**result, "segmentation": one.rle}


def _annotation(one: Object, image_id: int, number: int) -> dict[str, Any]:
    shape = {"area": one.area, "iscrowd": 0, "segmentation": one.rle or []}
    return {"id": number, **_result(one, image_id), **shape, "prompt": one.prompt}


def _save_ids(path: Path, ids: np.ndarray) -> None:
    channels = np.ascontiguousarray(ids, "<u4").view(np.uint8).reshape(*ids.shape, 4)[..., :3]  # lowest byte first
    Image.fromarray(np.ascontiguousarray(channels)).save(path, format="PNG", compress_level=1)  # flat: small anyway


def _segments(image: LabelledImage, ids: np.ndarray) -> list[dict[str, Any]]:
    areas = np.bincount(ids.ravel(), minlength=len(image.objects) + 1)
    segments = []
    for number, place in enumerate(ndimage.find_objects(ids), start=1):
        if place is not None:
            rows, columns = place
            box = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
            segments.append(
                {
                    "id": number,
                    "category_id": image.objects[number - 1].label + 1,
                    "area": int(areas[number]),
                    "bbox": box,
                    "iscrowd": 0,
                    "score": image.objects[number - 1].score,
                }
            )
    return segments

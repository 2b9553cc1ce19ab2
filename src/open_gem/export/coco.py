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


def write_coco(labelled: Labelled, output: Output) -> None:
    """Write `instances.json` and `results.json`, as pycocotools' `COCO` and `loadRes` read them.

    Image ids count from 1 in the order of the parts, category ids are the label's position + 1. Masks are RLE; an
    object without one has `"segmentation": []` and the area of its box. Two keys are beyond COCO's: `score`, the
    confidence, and `prompt`.
    """
    head = {"info": {"description": "labelled by open_gem"}, "licenses": [], "categories": categories(labelled)}
    with ExitStack() as files:
        images, annotations = files.enter_context(
            json_arrays(output.folder / "instances.json", head, "images", "annotations")
        )
        results = files.enter_context(json_array(output.folder / "results.json"))
        count = 0
        for number, image in enumerate(labelled, start=1):
            images.add(_image(image, number))
            for obj in image.objects:
                count += 1
                annotations.add(_annotation(obj, number, count))
                results.add(_result(obj, number))


def write_panoptic(labelled: Labelled, output: Output) -> None:
    """Write `panoptic.json` and one PNG an image in `panoptic/`, whose id at a pixel is red + 256 green + 65536 blue.

    Where objects overlap, `maps.pixels` says which has the pixel; one that has no pixel left, or no mask, is left out.
    Ids of segments count from 1 in each image; 0 is no segment.
    """
    head = {"info": {"description": "labelled by open_gem"}, "licenses": [], "categories": categories(labelled)}
    with json_arrays(output.folder / "panoptic.json", head, "images", "annotations") as (images, annotations):
        for number, image in enumerate(labelled.each("labelmap"), start=1):
            path = output.place("panoptic", image.id, ".png")
            if path is None:
                continue
            _, ids = pixels(image)
            _save_ids(path, ids)
            images.add(_image(image, number))
            name = path.relative_to(output.folder / "panoptic").as_posix()
            annotations.add({"image_id": number, "file_name": name, "segments_info": _segments(image, ids)})


def categories(labelled: Labelled) -> list[dict[str, Any]]:
    return [
        {"id": number, "name": label, "supercategory": "", "isthing": 1}
        for number, label in enumerate(labelled.labels, start=1)
    ]


def _image(image: LabelledImage, number: int) -> dict[str, Any]:
    return {"id": number, "file_name": image.id, "height": image.size.height, "width": image.size.width}


def _result(obj: Object, image_id: int) -> dict[str, Any]:
    result = {"image_id": image_id, "category_id": obj.index + 1, "bbox": obj.xywh, "score": obj.confidence}
    return result if obj.rle is None else {**result, "segmentation": obj.rle}


def _annotation(obj: Object, image_id: int, number: int) -> dict[str, Any]:
    shape = {"area": obj.area, "iscrowd": 0, "segmentation": obj.rle or []}
    return {"id": number, **_result(obj, image_id), **shape, "prompt": obj.prompt}


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
                    "category_id": image.objects[number - 1].index + 1,
                    "area": int(areas[number]),
                    "bbox": box,
                    "iscrowd": 0,
                    "score": image.objects[number - 1].confidence,
                }
            )
    return segments

"""COCO: instances, results and panoptic segmentation."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from open_gem.export.labelled import Labelled, LabelledImage, Object
from open_gem.export.maps import pixels
from open_gem.export.output import Items, Output, json_array, json_arrays
from open_gem.export.split import with_set


def write_coco(labelled: Labelled, output: Output) -> None:
    """Write `instances.json` and `results.json`, as pycocotools' `COCO` and `loadRes` read them.

    Image ids count from 1 in the order of the parts, category ids are the label's position + 1. Masks are RLE; an
    object without one has `"segmentation": []` and the area of its box. Two keys are beyond COCO's: `score`, the
    confidence, and `prompt`. Each set has files of its own, `instances_train.json`; ids count through all of them.
    Images are in `images/`.
    """
    with ExitStack() as files:
        documents = _documents(labelled, output, "instances", files)
        all_results = {
            name: files.enter_context(json_array(output.folder / f"{with_set('results', name)}.json"))
            for name in output.split.names
        }
        count = 0
        for number, image in enumerate(labelled, start=1):
            if (paths := output.places(image, images="images")) is None:
                continue
            name = paths[0].relative_to(output.folder / "images").as_posix() if paths else image.id
            set_name = output.split.of(image.id)
            (images, annotations), results = documents[set_name], all_results[set_name]
            images.add(_image(image, number, name))
            for obj in image.objects:
                count += 1
                annotations.add(_annotation(obj, number, count))
                results.add(_result(obj, number))


def write_panoptic(labelled: Labelled, output: Output) -> None:
    """Write `panoptic.json` and one PNG an image in `panoptic/`, whose id at a pixel is red + 256 green + 65536 blue.

    Where objects overlap, `maps.pixels` says which has the pixel; one that has no pixel left, or no mask, is left out.
    Ids of segments count from 1 in each image; 0 is no segment. Each set has a document and a folder of its own.
    """
    with ExitStack() as files:
        documents = _documents(labelled, output, "panoptic", files)
        for number, image in enumerate(labelled.each("labelmap"), start=1):
            set_name = output.split.of(image.id)
            folder = with_set("panoptic", set_name)
            path = output.place(folder, image, ".png")
            if path is None:
                continue
            _, ids = pixels(image)
            _save_ids(path, ids)
            images, annotations = documents[set_name]
            images.add(_image(image, number, image.id))
            name = path.relative_to(output.folder / folder).as_posix()
            annotations.add({"image_id": number, "file_name": name, "segments_info": _segments(image, ids)})


def _documents(labelled: Labelled, output: Output, kind: str, files: ExitStack) -> dict[str, tuple[Items, ...]]:
    """Open the document of each set: its images and annotations."""
    head = {"info": {"description": "labelled by open_gem"}, "licenses": [], "categories": categories(labelled)}
    return {
        name: files.enter_context(
            json_arrays(output.folder / f"{with_set(kind, name)}.json", head, "images", "annotations")
        )
        for name in output.split.names
    }


def categories(labelled: Labelled) -> list[dict[str, Any]]:
    return [
        {"id": number, "name": label, "supercategory": "", "isthing": 1}
        for number, label in enumerate(labelled.labels, start=1)
    ]


def _image(image: LabelledImage, number: int, file_name: str) -> dict[str, Any]:
    return {"id": number, "file_name": file_name, "height": image.size.height, "width": image.size.width}


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

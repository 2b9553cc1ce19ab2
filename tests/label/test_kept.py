"""What is kept of an image stands for what the model saw: values come back within a step, and so do objects."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from open_gem import Views, load
from open_gem.data.scenes import CONCEPTS, scene
from open_gem.errors import InputError, OutputError
from open_gem.label.done import writing
from open_gem.label.kept import keep, kept_images, restore
from open_gem.label.labeling import Labeling
from open_gem.label.local import label, run
from open_gem.label.ontology import Ontology
from open_gem.label.parts import Parts
from open_gem.label.sources import Item, open_source
from open_gem.localization import Localization
from open_gem.text import Vocabulary
from open_gem.types import Size

CLASSES = {"labels": {"cat": ["cat", "kitten"], "dog": ["dog"]}, "background": ["sky"], "presence": 0}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for seed in range(5):
        Image.fromarray(scene(seed, (64, 64 + 16 * (seed % 2))).image).save(tmp_path / "photos" / f"{seed}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    return tmp_path / "photos"


def labelled(photos: Path, labeling: Labeling, **settings: Any) -> Parts:
    source, folder = open_source(str(photos)), photos.parent / "labels"
    with writing(folder):
        parts = Parts.claim(folder, labeling.manifest(source))
        run(parts, labeling, source, **settings)
    return parts


def kept_of(localization: Localization, floor: float = 0.0) -> Localization:
    vocabulary = localization.vocabulary or Vocabulary.of(localization.labels)
    return restore(keep(localization, floor), vocabulary, localization.size)


# Values ---------------------------------------------------------------------------------------------------------------


def test_all_that_the_model_saw_comes_back(photos, tiny_localizer):
    parts = labelled(photos, Labeling(tiny_localizer, Ontology.of(CLASSES)), images_per_part=2)
    kept = {image.id: image.localization for image in kept_images(parts)}
    assert sorted(kept) == [f"{seed}.png" for seed in range(5)], "an image with an error has nothing to keep"
    for id, again in kept.items():
        result = tiny_localizer(photos / id, Ontology.of(CLASSES).vocabulary)
        assert (again.labels, again.size, again.vocabulary) == (result.labels, result.size, result.vocabulary)
        assert again.logit_scale == result.logit_scale
        for name in ("scores", "presence"):
            assert torch.allclose(getattr(again, name), getattr(result, name), atol=1e-5)
        assert torch.allclose(again.similarity, result.similarity, atol=1e-5)


def test_a_value_is_kept_within_half_a_step_of_its_map():
    """Between its lowest and highest value, which are exact; float16 has steps of 1e-4 there."""
    random = np.random.default_rng(0)
    maps = torch.from_numpy(random.uniform(0.15, 0.3, (3, 28, 37)).astype(np.float32))
    again = kept_of(Localization(("a", "b", "c"), maps, Size(448, 592))).similarity
    for values, kept in zip(maps, again, strict=True):
        step = (values.max() - values.min()).item() / 65535
        assert (kept - values).abs().max().item() <= 0.51 * step + 2e-8  # and a float32 is rounded
        assert (kept.min(), kept.max()) == (values.min(), values.max())


@pytest.mark.parametrize("value", [0.0, 0.2, -0.7])
def test_a_constant_map_stays_as_it_is(value):
    maps = torch.full((1, 2, 3), value, dtype=torch.float32, device="cpu")
    assert torch.equal(kept_of(Localization(("a",), maps, Size(4, 6))).similarity, maps)


def test_what_is_kept_is_kept_once_more_without_loss():
    maps = torch.from_numpy(np.random.default_rng(1).normal(0.2, 0.05, (2, 9, 7)).astype(np.float32))
    once = kept_of(Localization(("a", "b"), maps, Size(90, 70)))
    assert torch.equal(kept_of(once).similarity, once.similarity)


# Only likely labels ---------------------------------------------------------------------------------------------------


def test_below_the_floor_no_map_is_kept():
    maps = torch.from_numpy(np.random.default_rng(2).normal(0.2, 0.05, (4, 9, 7)).astype(np.float32))
    presence = torch.tensor([0.1, 0.5], dtype=torch.float32, device="cpu")
    vocabulary = Vocabulary.of({"cat": ["cat", "kitten"], "dog": ["dog"]}).with_background(["sky"])
    result = Localization(("cat", "dog"), maps, Size(90, 70), presence=presence, vocabulary=vocabulary)
    kept = keep(result, 0.5)
    assert len(kept["values"]) == 2 * 9 * 7
    again = kept_of(result, 0.5)
    assert again.maps[[0, 1, 3]].isnan().all(), "nor of the background, which only a softmax over all prompts needs"  # pyright: ignore[reportAttributeAccessIssue]
    ours, expected = (some.to_dict(presence=0.5)["objects"] for some in (again, kept_of(result)))
    for obj in (*ours, *expected):
        obj.pop("confidence")  # has no probability without the maps of all prompts
    assert expected and ours == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 1.5}, "keep floor is 1.5, expected a presence in"),
        ({"keep": 0.6}, "presence of label 'cat' is 0.5, expected 0.6 or more"),
        ({"keep": 0.1, "absent": "denoise"}, "absent 'denoise' needs the maps of all labels"),
        ({"keep": 0.1, "heatmap_scale": "probability"}, "heatmap scale 'probability' needs the maps of all labels"),
    ],
)
def test_rules_that_need_maps_below_the_floor_are_refused(settings, words, tiny_localizer):
    with pytest.raises(InputError, match=words):
        Labeling(tiny_localizer, Ontology.of(["cat", "dog"]), **settings)


# On disk --------------------------------------------------------------------------------------------------------------


def test_nothing_is_kept_where_maps_are_merged_at_pixel_size(photos, tiny_localizer):
    merged = replace(tiny_localizer, views=Views(window=32, stride=16, merge="logits"))
    parts = labelled(photos, Labeling(merged, Ontology.of(CLASSES)))
    assert not (parts.folder / "_kept").exists()
    with pytest.raises(InputError, match="nothing that the model saw is kept"):
        next(kept_images(parts))


def test_a_file_that_is_gone_or_of_another_part_is_named(photos, tiny_localizer):
    parts = labelled(photos, Labeling(tiny_localizer, Ontology.of(CLASSES)), images_per_part=3)
    first, second = (parts.kept_path(path) for path in parts.paths())
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(OutputError, match=f"{first.name}' has not what was kept of .*: remove 'part-"):
        list(kept_images(parts))
    first.unlink()
    with pytest.raises(OutputError, match=f"{first.name}' has not"):
        list(kept_images(parts))
    first.write_bytes(content)
    assert len(list(kept_images(parts))) == 5


def test_errors_may_be_forgotten(photos, tiny_localizer):
    parts = labelled(photos, Labeling(tiny_localizer, Ontology.of(CLASSES)), images_per_part=4)
    assert parts.forget_errors() == ["broken.png"]
    assert len(list(kept_images(parts))) == 5


def test_files_of_parts_that_were_never_written_are_removed(photos, tiny_localizer):
    """A process was killed between the two."""
    parts = labelled(photos, Labeling(tiny_localizer, Ontology.of(CLASSES)))
    orphan = parts.kept_path(parts.path("never"))
    orphan.write_bytes(b"")
    with writing(parts.folder):
        pass
    assert not orphan.exists() and len(list(kept_images(parts))) == 5


@pytest.fixture(scope="module")
def scenes() -> Iterator[Any]:
    localizer = load("embedded", device="cpu").acknowledge()
    return (localizer(scene(seed, 256).image, CONCEPTS[:40]) for seed in range(8))


def test_objects_of_kept_values_are_those_of_the_model(scenes):
    """Scores within a step; of the pixels of masks, hardly any changes sides."""
    objects = pixels = changed = 0
    for result in scenes:
        before, after = (one.objects(presence=0.3) for one in (result, kept_of(result)))
        assert [(one.label, one.prompt) for one in before] == [(one.label, one.prompt) for one in after]
        assert [one.score for one in before] == pytest.approx([one.score for one in after], abs=1e-5)
        objects += len(before)
        pixels += sum(one.area for one in before)
        changed += sum((one.mask ^ other.mask).sum() for one, other in zip(before, after, strict=True))  # pyright: ignore[reportOptionalOperand]
    assert objects > 20 and changed <= 1e-4 * pixels


def test_rows_are_made_of_what_is_kept(photos, tiny_localizer):
    labeling = Labeling(tiny_localizer, Ontology.of(CLASSES))
    [row] = label(labeling, [Item("0.png", str(photos / "0.png"))])
    kept = restore(row["kept"], labeling.classes.vocabulary, Size(row["height"], row["width"]))
    assert labeling.fields(kept)["objects"] == row["objects"] != []


def test_kept_values_are_parquet_of_a_documented_schema(photos, tiny_localizer):
    parts = labelled(photos, Labeling(tiny_localizer, Ontology.of(CLASSES)))
    [path] = parts.paths()
    table = pyarrow.parquet.read_table(str(parts.kept_path(path)))
    row = table.to_pylist()[0]
    codes = np.frombuffer(row["values"], "<u2").reshape(-1, *row["grid"])
    low, high = (np.array(row[name])[:, None, None] for name in ("low", "high"))
    expected = tiny_localizer(photos / row["id"], Ontology.of(CLASSES).vocabulary).similarity.numpy()
    assert np.allclose(low + codes * (high - low) / 65535, expected, atol=1e-5)

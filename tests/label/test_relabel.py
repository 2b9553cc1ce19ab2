"""Other thresholds without the model: rows are those of a fresh run, and whatever happens all parts are old or new."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from open_gem import Pamr
from open_gem.data.scenes import scene
from open_gem.errors import InputError, OutputError, PromptError
from open_gem.label import parts as parts_module
from open_gem.label.done import writing
from open_gem.label.kept import kept_images
from open_gem.label.labeling import Labeling
from open_gem.label.local import run
from open_gem.label.ontology import Ontology
from open_gem.label.parts import LabelRow, Parts
from open_gem.label.relabel import relabel
from open_gem.label.rules import ObjectRules
from open_gem.label.sources import Source, open_source
from open_gem.label.tuning import check_class_file

CLASSES = {"labels": {"cat": ["cat", "kitten"], "dog": ["dog"]}, "background": ["sky"], "presence": 0}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "photos").mkdir()
    for seed in range(5):
        Image.fromarray(scene(seed, (64, 64 + 16 * (seed % 2))).image).save(tmp_path / "photos" / f"{seed}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    return open_source(str(tmp_path / "photos"))


@pytest.fixture
def labeling(tiny_localizer) -> Labeling:
    return Labeling(tiny_localizer, Ontology.of(CLASSES))


def labelled(folder: Path, labeling: Labeling, source: Source, **settings: Any) -> Parts:
    """Label image by image: which images share a pass decides the last digits of what the model sees."""
    with writing(folder):
        parts = Parts.claim(folder, labeling.manifest(source))
        run(parts, labeling, source, **{"images_per_part": 2, "batch_size": 1, **settings})
    return parts


def rows_of(parts: Parts) -> dict[str, LabelRow]:
    """All rows, without the time they took."""
    return {row["id"]: {**row, "seconds": None} for row in parts.rows()}


def rules_of(labeling: Labeling, **settings: Any) -> ObjectRules:
    return replace(ObjectRules.of(labeling.describe()), **settings)


# Rows -----------------------------------------------------------------------------------------------------------------


def test_maps_of_gradients_are_kept_too(source, tiny_localizer, tmp_path):
    labeling = Labeling(tiny_localizer.configured(method="clip-es"), Ontology.of(CLASSES))
    parts = labelled(tmp_path / "labels", labeling, source)
    changes = {"classes": Ontology.of({**CLASSES, "threshold": 0.8})}
    fresh = labelled(tmp_path / "fresh", replace(labeling, **changes), source)
    assert rows_of(relabel(parts, rules_of(labeling, **changes))) == rows_of(fresh)


def test_labels_of_exemplars_need_no_image_of_them(source, tiny_localizer, tmp_path):
    image = tmp_path / "mug.png"
    Image.fromarray(scene(7, 64).image).save(image)
    classes = Ontology.of({"labels": {"mug": ["mug", {"like": str(image), "box": [8, 8, 40, 40]}]}, "presence": 0})
    parts = labelled(tmp_path / "labels", Labeling(tiny_localizer, classes), source)
    before = rows_of(parts)
    image.unlink()
    rules = ObjectRules.of(parts.manifest.settings)
    [exemplar] = rules.classes.vocabulary.exemplars
    assert exemplar.name == "mug.png:8,8,40,40" and rules.classes.describe() == classes.describe()
    assert rows_of(relabel(parts, rules)) == before
    with pytest.raises(PromptError, match=r"cannot read the exemplar 'mug\.png"):
        tiny_localizer.check(exemplar)
    with pytest.raises(InputError, match="no class file can be written"):
        check_class_file(tmp_path / "new.yaml", classes)


CHANGES = [
    {"classes": Ontology.of({**CLASSES, "presence": 0.5})},
    {"classes": Ontology.of({**CLASSES, "threshold": 0.8})},
    {"classes": Ontology.of({**CLASSES, "labels": {"cat": ["cat", "kitten"], "dog": {"presence": 0.75}}})},
    {"min_area": 0.05},
    {"instances": "label", "outputs": ("boxes", "labelmap")},
    {"heatmap_scale": "probability"},
    {"heatmap_scale": "cosine", "classes": Ontology.of({**CLASSES, "threshold": 0.1})},
    {"absent": "denoise"},
    {"absent": "none", "classes": Ontology.of({**CLASSES, "presence": 1})},  # all labels, as with a presence of 0
]


@pytest.mark.parametrize("changes", CHANGES)
def test_rows_are_those_of_a_fresh_run(changes, source, labeling, tmp_path):
    parts = labelled(tmp_path / "labels", labeling, source)
    before = rows_of(parts)
    fresh = labelled(tmp_path / "fresh", replace(labeling, **changes), source)
    new = relabel(parts, rules_of(labeling, **changes), workers=1)
    assert rows_of(new) == rows_of(fresh)
    assert (rows_of(new) == before) == (changes.get("absent") == "none")
    assert new.manifest == Parts.open(tmp_path / "labels").manifest == fresh.manifest
    assert relabel(new, rules_of(labeling), workers=1).manifest.settings == json.loads(
        json.dumps(labeling.manifest(source).settings)
    )
    assert rows_of(new) == before, "and back again"


def test_labelling_resumes_by_the_new_thresholds(source, labeling, tmp_path):
    parts = labelled(tmp_path / "labels", labeling, source, limit=2)
    stricter = replace(labeling, classes=Ontology.of({**CLASSES, "presence": 0.5}))
    relabel(parts, rules_of(stricter), workers=1)
    with pytest.raises(InputError, match="holds labels made with other settings"):
        labelled(tmp_path / "labels", labeling, source)
    assert rows_of(labelled(tmp_path / "labels", stricter, source)) == rows_of(
        labelled(tmp_path / "fresh", stricter, source)
    )


def test_a_new_folder_is_one_of_its_own(source, labeling, tmp_path):
    """It shares what was kept, without a copy, and outlives the old one."""
    parts = labelled(tmp_path / "labels", labeling, source)
    before = rows_of(parts)
    rules = rules_of(labeling, instances="label")
    new = relabel(parts, rules, tmp_path / "new", workers=1)
    assert rows_of(parts) == before != rows_of(new)
    assert all(new.kept_path(path).samefile(parts.kept_path(path)) for path in parts.paths())
    with pytest.raises(InputError, match="holds labels already"):
        relabel(parts, rules, tmp_path / "new")
    for path in parts.paths():
        parts.kept_path(path).unlink()
    assert len(list(kept_images(new))) == 5
    assert rows_of(relabel(new, rules_of(labeling), workers=1)) == before


def test_processes_share_the_parts(source, labeling, tmp_path):
    parts = labelled(tmp_path / "labels", labeling, source)
    counts: list[int] = []
    rules = rules_of(labeling, min_area=0.05)
    many = rows_of(relabel(parts, rules, tmp_path / "many", workers=2, progress=counts.append))
    assert sorted(counts) == [2, 2, 2]
    assert many == rows_of(relabel(parts, rules, tmp_path / "single", workers=1))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({"labels": {"cat": ["cat"], "dog": ["dog"]}, "background": ["sky"]}, r'prompts.cat was \["cat", "kitten"\]'),
        ({"labels": {"cat": ["cat", "kitten"], "cow": ["cow"]}, "background": ["sky"]}, "prompts.dog was"),
        ({"labels": {"dog": ["dog"], "cat": ["cat", "kitten"]}, "background": ["sky"]}, "labels was"),
        ({"labels": CLASSES["labels"], "background": ["sea"]}, r'background was \["sky"\], is \["sea"\]'),
    ],
)
def test_other_prompts_are_refused_with_the_difference(classes, words, source, labeling, tmp_path):
    parts = labelled(tmp_path / "labels", labeling, source)
    with pytest.raises(InputError, match=f"other prompts need the model, .*{words}"):
        relabel(parts, rules_of(labeling, classes=Ontology.of(classes)))
    assert Parts.open(parts.folder).manifest == parts.manifest


def test_what_was_not_kept_is_refused(source, labeling, tmp_path):
    nothing = labelled(tmp_path / "nothing", replace(labeling, keep=None), source)
    with pytest.raises(InputError, match="nothing that the model saw is kept"):
        relabel(nothing, rules_of(labeling))
    classes = Ontology.of({**CLASSES, "presence": 0.5})
    floored = labelled(tmp_path / "floored", replace(labeling, classes=classes, keep=0.5), source)
    with pytest.raises(InputError, match=r"presence of label 'cat' is 0, expected 0\.5 or more"):
        relabel(floored, rules_of(replace(labeling, classes=classes, keep=0.5), classes=labeling.classes))
    refined = replace(labeling, localizer=replace(labeling.localizer, refinement=Pamr()))
    with pytest.raises(InputError, match="refined by 'pamr', which needs the images"):
        relabel(labelled(tmp_path / "refined", refined, source), rules_of(labeling))


# Whatever happens -----------------------------------------------------------------------------------------------------


def test_an_error_on_the_way_leaves_the_old_labels(source, labeling, tmp_path):
    parts = labelled(tmp_path / "labels", labeling, source)
    before, last = rows_of(parts), parts.paths()[-1]
    parts.kept_path(last).unlink()
    with pytest.raises(OutputError, match="has not what was kept"):
        relabel(parts, rules_of(labeling, instances="label"), workers=1)
    assert rows_of(Parts.open(parts.folder)) == before
    assert not (parts.folder / parts_module.STAGED).exists()


KILLED = """
import os, sys
from pathlib import Path
from dataclasses import replace
from open_gem.label.parts import Parts
from open_gem.label.relabel import relabel
from open_gem.label.rules import ObjectRules

left, moved, move, unlink = int(sys.argv[2]), 0, Path.replace, os.rename

def replace_unless_killed(self, target):
    global left
    if Path(target).name.startswith(("part-", "_manifest")):
        left -= 1
        if left < 0:
            os._exit(9)
    return move(self, target)

Path.replace = replace_unless_killed
parts = Parts.open(sys.argv[1])
relabel(parts, replace(ObjectRules.of(parts.manifest.settings), instances="label"), workers=1)
"""


@pytest.mark.slow
def test_killed_anywhere_it_leaves_the_old_labels_or_the_new_ones(source, labeling, tmp_path):
    """Three parts and a manifest are written, and then moved."""
    old = rows_of(labelled(tmp_path / "old", labeling, source))
    new = rows_of(labelled(tmp_path / "new", replace(labeling, instances="label"), source))
    outcomes = []
    for left in range(9):
        folder = tmp_path / str(left)
        labelled(folder, labeling, source)
        code = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(left)], env=dict(os.environ)).returncode
        assert code == (9 if left < 8 else 0)
        parts = Parts.open(folder)
        is_new = parts.manifest.settings["instances"] == "label"
        assert rows_of(parts) == (new if is_new else old)
        outcomes.append(is_new)
        with writing(folder):
            assert not (folder / parts_module.STAGED).exists()
    assert outcomes == [False] * 4 + [True] * 5


def test_no_model_is_loaded(source, labeling, tmp_path):
    labelled(tmp_path / "labels", labeling, source)
    code = (
        "import sys; from open_gem.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "models = {'transformers', 'open_clip', 'open_gem.localizer', 'open_gem.towers'}; "
        "sys.exit(' '.join(models & set(sys.modules)) or 0)"
    )
    arguments = ["relabel", str(tmp_path / "labels"), "--presence", "0.5", "--samples", "0", "--workers", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=dict(os.environ)
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["images"] == 6

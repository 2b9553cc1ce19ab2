"""The table of families, read whole: names exist, towers are what the table says, and each is checked.

`python -m pytest -m full` compares a full-size model of every family, with random weights, to its own library (some
minutes, up to 8 GB of memory); tiny ones of every kind are compared in the tests of each tower.
"""

import re
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import hub_checkpoints
import open_clip
import pytest
import torch
from method.guides import Colours
from towers import test_native as native_tests
from towers import test_timm as timm_tests
from towers import test_tipsv2_naflex as recent

from open_gem import METHODS, list_models, run, towers
from open_gem.errors import UnsupportedModelError
from open_gem.method.guided import GUIDED
from open_gem.towers import DEFAULT_MODEL, transformers
from open_gem.towers import open_clip as library
from open_gem.towers.check import check
from open_gem.towers.choices import CHOICES, Choice
from open_gem.towers.families import find_family, find_tower
from open_gem.towers.loading import FAMILIES, ModuleTower

OPEN_CLIP = [row for row in FAMILIES if row.library == "open_clip"]


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: f"{row.library} {row.name}")
def test_examples_belong_to_their_family(row):
    assert row.examples
    for name, _ in row.examples:
        assert find_family(row.library, name) is row, name


@pytest.mark.parametrize("row", OPEN_CLIP, ids=lambda row: row.name)
def test_examples_are_names_and_tags_that_can_be_read(row):
    for name, tag in row.examples:
        assert tag in open_clip.list_pretrained_tags_by_model(name), (name, tag)
        assert library.configuration(name, tag)["pretrained"] == tag


@pytest.fixture(scope="module")
def vision_towers() -> dict[str, torch.nn.Module]:
    """The vision tower of every architecture of open_clip, without memory for its weights."""
    made = {}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in open_clip.list_models():
            config = open_clip.get_model_config(name)
            assert config is not None
            build = open_clip.model._build_vision_tower
            made[name] = build(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)).eval()
    return made


@pytest.mark.slow
def test_every_architecture_of_open_clip_is_read_by_its_family_or_refused_with_the_reason(vision_towers):
    assert len(vision_towers) > 100
    refused = []
    for name, visual in vision_towers.items():
        family, reason = find_family("open_clip", name), library.unsupported_reason(name)
        assert (family is None) == (reason is not None), name
        if family is None:
            with pytest.raises(UnsupportedModelError):
                library.read_tower(visual, name)
            assert re.match(r"its vision tower .{20,}", str(reason)), reason
            assert "is of no family here" not in str(reason), name
            refused.append(name)
        else:
            tower = find_tower("open_clip", getattr(visual, "trunk", visual))
            assert tower is not None and family.tower.endswith(f":{tower.__name__}"), name
            library.read_tower(visual, name)
    assert len(refused) < len(vision_towers) / 4


def test_models_are_listed_once_each():
    rows = towers.list_models()
    assert len({(row.name, row.tag) for row in rows}) == len(rows)
    assert {row.name for row in rows} >= {"embedded", *open_clip.list_models()}
    assert {(row.name, row.tag) for row in rows} >= {tuple(pair) for pair in open_clip.list_pretrained()}
    for row in rows:
        assert (row.family is None) == (row.unsupported_reason is not None), row


def test_the_model_in_the_package_and_folders_are_checked_with_their_own_weights(tiny):
    for name in ("embedded", tiny):
        ours, loaded = towers.build_tower(name), towers.load(name, device="cpu").vision
        assert type(ours) is type(loaded)
        assert torch.equal(ours.patch_weight, loaded.patch_weight)


def tiny_native(kind: str) -> ModuleTower:
    return native_tests.native(**native_tests.KINDS[kind])


def tiny_timm(kind: str) -> ModuleTower:
    return timm_tests.adapted(timm_tests.model(kind))


def tiny_transformers(kind: str) -> ModuleTower:
    return transformers.read_tower(hub_checkpoints.model(kind))


TINY = {  # a tiny model of every family; the tests of each tower have many more
    ("open_clip", "CLIPA"): partial(tiny_native, "CLIPA"),
    ("open_clip", "CoCa"): partial(tiny_native, "CoCa"),
    ("open_clip", "NLLB-CLIP"): partial(tiny_native, "CLIP"),
    ("open_clip", "CLIP"): partial(tiny_native, "CLIP"),
    ("open_clip", "SigLIP"): partial(tiny_timm, "SigLIP"),
    ("open_clip", "MobileCLIP"): partial(tiny_timm, "MobileCLIP-B"),
    ("open_clip", "ViTamin"): partial(tiny_timm, "ViTamin"),
    ("open_clip", "EVA-CLIP"): partial(tiny_timm, "EVA02"),
    ("open_clip", "PE-Core"): partial(tiny_timm, "PE"),
    ("transformers", "CLIP"): partial(tiny_transformers, "clip"),
    ("transformers", "MetaCLIP 2"): partial(tiny_transformers, "metaclip_2"),
    ("transformers", "SigLIP"): partial(tiny_transformers, "siglip"),
    ("transformers", "SigLIP 2 NaFlex"): lambda: transformers.read_tower(recent.model("siglip2")),
    ("transformers", "TIPSv2"): lambda: transformers.read_tower(recent.model("tipsv2")),
    ("transformers", "BLIP"): partial(tiny_transformers, "blip"),
}


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: f"{row.library} {row.name}")
def test_a_tiny_model_of_every_family_equals_its_library(row):
    tower = TINY[row.library, row.name]()
    assert row.tower.endswith(f":{type(tower).__name__}")
    for difference in check(tower):
        assert difference.fits(torch.float32), difference


@pytest.mark.parametrize("shape", [(3, 3), (2, 5)], ids=["square", "wide"])
@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: f"{row.library} {row.name}")
def test_every_method_reads_a_tiny_model_of_every_family(row, shape):
    tower = TINY[row.library, row.name]()
    pixels = torch.randn(2, 3, shape[0] * tower.patch[0], shape[1] * tower.patch[1])
    methods = {name: replace(way, depth=min(way.depth, tower.layers)) for name, way in METHODS.items()}
    before = {name: weight.clone() for name, weight in tower.module.state_dict().items()}
    embedding = run(tower, pixels, {"clip": METHODS["clip"]}, pooled=True, exact=True)["clip"].pooled
    found = run(tower, pixels, methods, pooled=True)
    assert found.keys() == METHODS.keys()
    for name, features in found.items():
        assert features.grid == shape, name
        assert features.patches.shape == (2, shape[0] * shape[1], features.tokens.shape[-1]), name
        assert features.tokens.isfinite().all(), name
        assert features.patches.std() > 0, name
        torch.testing.assert_close(features.pooled, embedding, rtol=0, atol=2e-5)
    after = tower.module.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("finer", [1, 2], ids=["own grid", "finer"])
@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: f"{row.library} {row.name}")
def test_every_method_with_a_guide_reads_a_tiny_model_of_every_family(row, finer):
    tower = TINY[row.library, row.name]()
    pixels = torch.randn(2, 3, 2 * tower.patch[0], 5 * tower.patch[1])
    guide = Colours(tower.patch[0] // finer)
    regions = torch.randint(0, 4, (2, *pixels.shape[-2:]))
    methods = {name: make(guide) for name, make in GUIDED.items()}
    for name, features in run(tower, pixels, methods, regions=regions).items():
        features = features.stepped(methods[name].steps)
        assert features.grid == ((2, 5) if name == "lposs" else (2 * finer, 5 * finer)), name
        assert features.patches.shape == (2, features.grid.patches, features.tokens.shape[-1]), name
        assert features.tokens.isfinite().all(), name
        assert features.patches.std() > 0, name


def test_the_documentation_has_every_family():
    document = (Path(__file__).parents[2] / "docs" / "reference" / "models.md").read_text("utf-8")
    for row in FAMILIES:
        assert f"| {row.name} | {row.library} |" in document
        assert f"| {row.about} |" in document, row.name


@pytest.mark.full
@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: f"{row.library} {row.name}")
def test_a_full_size_model_equals_its_library(row):
    for difference in check(towers.build_tower(row.examples[0][0])):
        assert difference.fits(torch.float32), difference


# Which model should I use? --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.name}-{choice.tag}")
def test_a_recommended_model_is_supported_and_as_large_as_its_row_says(choice: Choice):
    assert (choice.name, choice.tag, None) in [(row.name, row.tag, row.unsupported_reason) for row in list_models()]
    config = open_clip.get_model_config(choice.name)
    assert config is not None
    is_custom = config.pop("custom_text", False) or "timm_model_name" in config["vision_cfg"]
    with torch.device("meta"):
        model = (open_clip.CustomTextCLIP if is_custom else open_clip.CLIP)(**config)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert choice.parameters == round(parameters / 1e6, 1) and choice.download == round(4 * choice.parameters)
    assert choice.name == "PE-Core-B-16" or f"-{choice.patch}" in choice.name


def test_the_first_recommended_model_is_the_default():
    assert CHOICES[0][:2] == DEFAULT_MODEL and CHOICES[0].relative_time == 1
    assert CHOICES[0].published[:2] == (46.2, 32.6)

"""LPOSS+ against its equations as a sparse matrix, with scipy's conjugate gradients and scikit-image's Lab."""

import pickle
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse import csr_matrix, diags, eye
from scipy.sparse.linalg import cg
from skimage.color import rgb2lab
from torch import Tensor

from open_gem import Localization
from open_gem.data.scenes import scene
from open_gem.errors import InputError
from open_gem.refine import find_refinement
from open_gem.refine.lposs import LpossPlus, to_lab
from open_gem.types import Size


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(height: int, width: int) -> Tensor:
    """An image whose neighbours are alike enough to be connected."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([0.3 + 0.1 * rows, 0.5 - 0.1 * columns, 0.4 + 0.02 * random(height, width)])


def slow_system(image: Tensor, alpha: float, tau: float, reach: int) -> csr_matrix:
    """I − α W."""
    height, width = image.shape[1:]
    lab = (rgb2lab(image.permute(1, 2, 0).double().numpy()) / (100, 128, 128)).reshape(-1, 3)
    rows, columns, values = [], [], []
    for y, x in product(range(height), range(width)):
        for down, right in product(range(-reach, reach + 1), repeat=2):
            v, u = y + down, x + right
            if (down, right) != (0, 0) and 0 <= v < height and 0 <= u < width:
                rows.append(y * width + x)
                columns.append(v * width + u)
                values.append(np.exp(-np.linalg.norm(lab[rows[-1]] - lab[columns[-1]]) / tau))
    graph = csr_matrix((values, (rows, columns)), shape=(height * width, height * width))
    degree = np.asarray(graph.sum(axis=1)).ravel()
    scale = diags(1 / np.sqrt(np.where(degree > 0, degree, 1)))
    return csr_matrix(eye(height * width) - alpha * scale @ graph @ scale)


@pytest.mark.parametrize(
    ("size", "settings"),
    [((12, 17), {}), ((9, 7), {"window": 3, "tau": 0.05}), ((5, 20), {"alpha": 0.5, "iterations": 3}), ((1, 4), {})],
)
def test_maps_are_propagated_as_the_equations_say(size, settings):
    refine, image = LpossPlus(**settings), smooth(*size)
    pairs = refine.weights(image.double())
    system = slow_system(image, refine.alpha, refine.tau, refine.window // 2)
    maps = random(3, *size, seed=1).double()
    ours = refine.propagate(pairs, maps)
    for own, heatmap in zip(ours, maps, strict=True):
        solved, _ = cg(system, heatmap.flatten().numpy(), rtol=1e-6, maxiter=refine.iterations)
        torch.testing.assert_close(own.flatten(), torch.from_numpy(solved), rtol=0, atol=1e-3)
    ones, _ = cg(system, np.ones(maps[0].numel()), rtol=1e-6, maxiter=refine.iterations)
    torch.testing.assert_close(refine(pairs, maps), ours / torch.from_numpy(ones).view(size), rtol=0, atol=1e-3)


def test_lab_is_that_of_scikit_image():
    image = random(3, 20, 30).double()
    image[:, :2] *= 0.01  # near black, where Lab is linear
    expected = torch.from_numpy(rgb2lab(image.permute(1, 2, 0).numpy())).permute(2, 0, 1)
    torch.testing.assert_close(to_lab(image), expected, rtol=0, atol=0.02)


def test_a_constant_map_stays_and_the_best_label_is_that_of_the_equations():
    refine, image = LpossPlus(), smooth(10, 12)
    pairs = refine.weights(image)
    torch.testing.assert_close(refine(pairs, torch.full((10, 12), 0.3)), torch.full((10, 12), 0.3))
    maps = random(4, 10, 12)
    assert torch.equal(refine(pairs, maps).argmax(dim=0), refine.propagate(pairs, maps).argmax(dim=0))


def test_a_coarse_map_follows_the_edge_of_the_image():
    image = torch.zeros(3, 40, 40)
    image[:, :, 23:] = 0.8
    coarse = torch.linspace(-1, 1, 40).expand(40, 40)  # its own edge is at 20
    refined = LpossPlus()(LpossPlus().weights(image), coarse)
    assert (refined[:, :23] < refined[:, 23:].min()).all()


def test_a_large_image_is_refined_at_its_shorter_side():
    refine = LpossPlus(short=20)
    pairs = refine.weights(random(3, 40, 60))
    assert pairs.size == (20, 30)
    assert refine(pairs, random(40, 60)).shape == (40, 60)
    assert refine.weights(random(3, 10, 60)).size == (10, 60)
    assert LpossPlus(short=None).weights(random(3, 40, 60)).size == (40, 60)


def test_by_name_it_refines_a_localization_which_can_be_pickled():
    image = scene(126, 64).image
    localization = Localization(("a", "b"), random(2, 4, 4), Size(64, 64))
    refined = find_refinement("lposs+").refine(Image.fromarray(image), localization)
    assert not torch.equal(refined.segment(), localization.segment())
    assert torch.equal(pickle.loads(pickle.dumps(refined)).segment(), refined.segment())


@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha", 1), ("alpha", 0), ("tau", 0), ("window", 4), ("window", 1), ("iterations", 0), ("short", 0)],
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name} is {value}, expected a"):
        LpossPlus(**{name: value})


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match=r"image is torch.float32 of shape \(1, 4, 4\)"):
        LpossPlus().weights(random(1, 4, 4))
    with pytest.raises(InputError, match=r"heatmap has shape \(4,\)"):
        LpossPlus()(LpossPlus().weights(random(3, 4, 4)), random(4))

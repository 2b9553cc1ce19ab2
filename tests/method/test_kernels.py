"""Our kernels for a CPU against torch's own and against the formulas; that they step aside, and how they are built."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from method.test_attention import close, explicit_self_self
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from open_gem.method import kernels
from open_gem.method.attention import Heads, query_key, self_self
from open_gem.method.kernels import attention, linear

TILE = 48


def heads(b: int = 2, h: int = 3, n: int = 50, c: int = 8, seed: int = 0) -> Heads:
    """As a packed projection gives them: not contiguous."""
    packed = torch.randn(b, n, 3, h, c, generator=torch.Generator().manual_seed(seed))
    return Heads(*packed.permute(2, 0, 3, 1, 4))


@pytest.fixture
def kernel() -> attention.Kernel:
    found = attention.load()
    if found.library is None:
        pytest.skip(found.reason)
    return found


@pytest.fixture
def rebuilt(monkeypatch, tmp_path) -> Iterator[Path]:
    """An empty cache folder; what is built in it is forgotten in the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    attention.load.cache_clear()
    yield tmp_path / "open_gem"
    attention.load.cache_clear()


# Attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("which", ["q", "kv", "qkv"])
@pytest.mark.parametrize("n", [1, 5, TILE - 1, TILE, TILE + 1, 3 * TILE + 7])
@pytest.mark.parametrize("c", [4, 16, 24, 64, 88])
def test_self_self_is_the_formula_at_every_shape(n, c, which, iterations):
    given, taus = heads(n=n, c=c, seed=n * c), [0.2, 0.9]
    chosen = [getattr(given, name) for name in which]
    inverse = 1 / torch.tensor(taus)[:, None, None, None]
    assert attention.fits(inverse, *chosen, given.v)
    ours = attention.self_self(chosen, given.v, inverse, iterations)
    settings = {"normalize": True, "iterations": iterations}
    explicit = [explicit_self_self(p, given.v, taus, **settings) for p in chosen]
    close(ours.double(), torch.stack(explicit).mean(dim=0), 3e-6)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("which", "n", "threads"), [("qkv", 3400, 1), ("qkv", 3400, 2), ("q", 5850, 1)])
def test_where_memory_would_not_be_linear_a_strip_of_rows_at_a_time_gives_the_same(which, n, threads, monkeypatch):
    given = heads(b=1, h=1, n=n, c=16)
    chosen = [getattr(given, name) for name in which]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ours = self_self(chosen, given.v, 6.0, normalize=True, iterations=1)
    monkeypatch.setenv(kernels.SWITCH, "0")
    close(ours, self_self(chosen, given.v, 6.0, normalize=True, iterations=1), 2e-6)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("n", [1, TILE - 1, TILE, 2 * TILE + 1])
@pytest.mark.parametrize("c", [4, 64, 80])
def test_query_key_is_torchs(n, c, scale):
    """Also where scores are so far apart that all but one weight of a row is next to nothing."""
    given = heads(n=n, c=c)
    q, k, v = given.q * scale, given.k, given.v
    assert attention.fits(1.0, q, k, v)
    expected = functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    close(attention.query_key(q, k, v).double(), expected, 3e-6 * scale)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_no_number_does_not_get_lost(strange, which):
    given = heads(b=1, h=1, n=60)
    given[which][0, 0, 7, 3] = strange
    expected = functional.scaled_dot_product_attention(*given)
    ours = attention.query_key(*given)
    assert not (ours.isfinite() & ~expected.isfinite()).any()
    assert not attention.self_self(list(given), given.v, 2.0, 1).isfinite().all()


@pytest.mark.usefixtures("kernel")
def test_short_tokens_are_normalised_as_torch_does():
    given = heads(n=30)
    faint = given.k * torch.logspace(-16, 0, 30)[:, None]
    ours = attention.self_self([faint], given.v, 3.0, 0)
    p = functional.normalize(faint, dim=-1)
    close(ours, functional.scaled_dot_product_attention(p * 3, p, given.v, scale=1.0), 2e-6)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "inverse", [-1.0, 0.0, torch.ones(2, 3, 1, 1), torch.ones(3, 1, 1, 1), torch.ones(1, requires_grad=True)]
)
def test_temperatures_that_it_does_not_know_are_left_to_torch(inverse):
    assert not attention.fits(inverse, *heads())


@pytest.mark.usefixtures("kernel")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_of_torch_go_past_it():
    given = heads()

    def mean(p: Tensor) -> Tensor:
        assert not attention.fits(2.0, p, p)
        return p.mean()

    torch.func.vmap(lambda p: mean(p[None]))(given.q)
    torch.func.jvp(mean, (given.q,), (given.k,))


@pytest.mark.usefixtures("kernel")
def test_what_one_image_gives_does_not_depend_on_those_beside_it():
    given, alone = heads(b=3), [Heads(*(p[i : i + 1] for p in heads(b=3))) for i in range(3)]
    inverse = torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
    together = attention.self_self(list(given), given.v, inverse, 1)
    for index, one in enumerate(alone):
        assert torch.equal(together[index], attention.self_self(list(one), one.v, float(index + 1), 1)[0])


@pytest.mark.usefixtures("kernel")
def test_tokens_that_are_all_zero_attend_to_all_alike():
    given = heads()
    blank = torch.zeros_like(given.q)
    close(attention.self_self([blank], given.v, 5.0, 1), given.v.mean(dim=2, keepdim=True).expand_as(given.v), 1e-6)


@pytest.mark.usefixtures("kernel")
def test_the_sharpest_temperature_it_takes_is_exact_and_a_sharper_one_goes_to_torch():
    given = heads(n=70, c=16)
    settings: dict[str, Any] = {"normalize": True, "iterations": 0}
    assert attention.fits(attention.SHARPEST, *given)
    for inverse in (attention.SHARPEST, 2 * attention.SHARPEST):
        ours = self_self([given.k], given.v, inverse, **settings)
        close(ours.double(), explicit_self_self(given.k, given.v, [1 / inverse] * 2, **settings), 2e-5)
    assert not attention.fits(attention.SHARPEST * 1.01, *given)
    assert not attention.fits(torch.tensor([1.0, 41.0])[:, None, None, None], *given)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "change",
    {
        "float64": lambda p: p.double(),
        "bfloat16": lambda p: p.bfloat16(),
        "not on a CPU": lambda p: p.to("meta"),
        "with gradient": lambda p: p.clone().requires_grad_(),
        "width not next to each other": lambda p: p.transpose(2, 3).contiguous().transpose(2, 3),
        "fewer keys": lambda p: p[:, :, :-1],
    }.items(),
    ids=lambda change: change[0],
)
def test_what_it_cannot_do_is_left_to_torch(change):
    given = heads()
    assert attention.fits(1.0, given.q, given.k)
    assert not attention.fits(1.0, given.q, change[1](given.k))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("n", [1, TILE - 1, TILE + 1, 3 * TILE + 7])
@pytest.mark.parametrize("c", [4, 64, 88])
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_more_threads_than_heads_give_the_same(threads, n, c, iterations, monkeypatch):
    """Three heads are as many as three threads take, and too few for eight."""
    given = heads(b=1, n=n, c=c)

    def attend() -> tuple[Tensor, ...]:
        assert attention.fits(3.0, *given)
        ours = (attention.self_self(list(given)[:count], given.v, 3.0, iterations) for count in (1, 2, 3))
        return (*ours, query_key(given))

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = attend()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for ours, expected in zip(attend(), alone, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("threads", "iteration", "scores"), [(6, 1.5, 0.5), (16, 2, 1)])
def test_operations_are_counted_as_they_are_done(threads, iteration, scores, monkeypatch):
    """Threads that share heads compute symmetric products whole."""
    given = heads(b=2, h=3, n=50, c=8)
    product = 2 * 50 * 50 * 8 * 2 * 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for work, products in (
        (lambda: query_key(given), 2),
        (lambda: self_self(list(given), given.v, 2.0, normalize=True, iterations=1), 3 * (iteration + scores) + 1),
        (lambda: self_self([given.q], given.v, 2.0, normalize=True, iterations=0), scores + 1),
    ):
        with FlopCounterMode(display=False) as counter:
            work()
        assert counter.get_total_flops() == products * product


@pytest.mark.usefixtures("kernel")
def test_torch_can_reason_about_it_without_running_it():
    given = heads()
    torch.library.opcheck(attention._self_self, (list(given), given.v, torch.ones(2), 1))
    torch.library.opcheck(attention._query_key, tuple(given))


STARVED = """
import resource, torch
from pathlib import Path
from open_gem.method.kernels import attention

heads = torch.randn(3, 1, 1, 400_000, 16).unbind()
attention.query_key(*(p[:, :, :50] for p in heads))
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (60 << 20), resource.RLIM_INFINITY))
try:
    attention.query_key(*heads)
except MemoryError as error:
    print(error)
"""


@pytest.mark.usefixtures("kernel")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="what is held is read from Linux's /proc")
def test_without_memory_there_is_an_error_and_no_crash():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", STARVED], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "no memory for the attention of (1, 1, 400000, 16)\n"), done.stderr


# bfloat16 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiles() -> None:
    if attention.load(torch.bfloat16).library is None:
        pytest.skip(attention.load(torch.bfloat16).reason)


@pytest.fixture
def no_tiles(kernel, monkeypatch) -> None:
    """A processor without AMX."""
    load = attention.load
    monkeypatch.setattr(attention, "load", lambda dtype=torch.float32: load() if dtype.itemsize == 4 else (None, ""))
    monkeypatch.setattr(attention, "_kernel", lambda dtype: torch.float32)


def half(given: Heads) -> tuple[Heads, Heads]:
    """The heads in bfloat16, and the same numbers in float64."""
    rounded = Heads(*(p.bfloat16() for p in given))
    return rounded, Heads(*(p.double() for p in rounded))


def close_to_bfloat16(ours: Tensor, expected: Tensor) -> None:
    """Within three roundings of the largest value."""
    assert ours.dtype == torch.bfloat16
    close(ours.double(), expected, 3 * 2**-8 * float(expected.abs().max()))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("which", ["v", "qk", "qkv"])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 150])
@pytest.mark.parametrize("c", [4, 32, 64, 80])
def test_tiles_give_the_formula_at_every_shape(n, c, which, iterations):
    given, exact = half(heads(n=n, c=c, seed=n * c))
    taus = [0.2, 0.9]
    chosen = [getattr(given, name) for name in which]
    inverse = 1 / torch.tensor(taus)[:, None, None, None]
    assert attention.fits(inverse, *chosen, given.v)
    ours = attention.self_self(chosen, given.v, inverse, iterations)
    expected = [
        explicit_self_self(getattr(exact, name), exact.v, taus, normalize=True, iterations=iterations) for name in which
    ]
    close_to_bfloat16(ours, torch.stack(expected).mean(dim=0))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("n", [1, 31, 33, 150])
@pytest.mark.parametrize("c", [4, 64, 80])
@pytest.mark.parametrize("scale", [1, 20])
def test_tiles_attend_as_the_model_was_trained(n, c, scale):
    given, exact = half(Heads(*(scale * p for p in heads(n=n, c=c))))
    close_to_bfloat16(query_key(given), functional.scaled_dot_product_attention(*exact))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("threads", [4, 5])
def test_threads_that_share_heads_and_those_that_do_not_give_the_same(threads, monkeypatch):
    """Six heads are few for four threads, and sixty many."""
    given = Heads(*(p.bfloat16() for p in heads(b=20, h=3, n=70, c=40)))

    def attend(given: Heads) -> tuple[Tensor, Tensor]:
        return attention.self_self(list(given), given.v, 3.0, 2), query_key(given)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = attend(given)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for ours, expected in zip(attend(given), alone, strict=True):
        assert torch.equal(ours, expected)
    for ours, expected in zip(attend(Heads(*(p[:2] for p in given))), alone, strict=True):
        assert torch.equal(ours, expected[:2])


@pytest.mark.usefixtures("tiles")
def test_operations_in_tiles_are_counted_as_they_are_done():
    """Symmetry saves none; the scores of the model's own attention are computed twice, and count once."""
    given = Heads(*(p.bfloat16() for p in heads(b=2, h=3, n=50, c=8)))
    for work, products in (
        (lambda: query_key(given), 2),
        (lambda: self_self(list(given), given.v, 2.0, normalize=True, iterations=1), 3 * (2 + 2)),
    ):
        with FlopCounterMode(display=False) as counter:
            work()
        assert counter.get_total_flops() == products * 2 * 50 * 50 * 8 * 2 * 3


@pytest.mark.usefixtures("tiles")
def test_what_is_no_number_stays_that_in_tiles():
    given = Heads(*(p.bfloat16() for p in heads(n=40)))
    given.k[0, 0, 7, 2] = torch.nan
    for ours in (query_key(given), attention.self_self([given.k], given.v, 2.0, 1)):
        assert ours[0, 0].isnan().all()
        assert ours[0, 1:].isfinite().all() and ours[1].isfinite().all()


@pytest.mark.usefixtures("no_tiles")
def test_without_tiles_bfloat16_is_computed_in_float32():
    given, exact = half(heads(n=90, c=24))
    assert attention.fits(2.0, *given)
    ours = self_self(list(given), given.v, 2.0, normalize=True, iterations=1)
    expected = self_self(list(exact), exact.v, 2.0, normalize=True, iterations=1)
    close_to_bfloat16(ours, expected)
    close_to_bfloat16(query_key(given), functional.scaled_dot_product_attention(*exact))


@pytest.mark.usefixtures("tiles")
def test_the_kernel_of_bfloat16_may_be_missing(rebuilt, monkeypatch):
    monkeypatch.setattr(attention, "FLAGS", (*attention.FLAGS, "-mno-amx-bf16"))
    assert attention.load(torch.bfloat16).library is None
    assert "could not be built" in attention.load(torch.bfloat16).reason
    given, exact = half(heads())
    close_to_bfloat16(query_key(given), functional.scaled_dot_product_attention(*exact))


# How it is built ------------------------------------------------------------------------------------------------------


def test_it_is_compiled_once_and_kept(rebuilt, kernel):
    first = attention.load()
    [made] = rebuilt.iterdir()
    assert first.library is not None
    stamp = made.stat().st_mtime_ns
    attention.load.cache_clear()
    assert attention.load().library is not None
    assert [path.stat().st_mtime_ns for path in rebuilt.iterdir()] == [stamp]


@pytest.mark.parametrize(
    ("compiler", "word"), [("false", "could not be built with false"), ("no-such-compiler", "could not be built")]
)
def test_without_a_compiler_that_works_torch_does_it(compiler, word, rebuilt, monkeypatch):
    given = heads()
    expected = functional.scaled_dot_product_attention(*given)
    monkeypatch.setenv("CC", compiler)
    assert attention.load().library is None
    assert word in attention.load().reason
    assert not attention.fits(1.0, *given)
    close(query_key(given), expected, 1e-6)
    assert list(rebuilt.iterdir()) == []  # nothing half-made


def test_a_compiler_that_no_shell_would_take_is_a_reason_and_no_traceback(rebuilt, monkeypatch):
    monkeypatch.setenv("CC", "gcc 'x")
    given = heads()
    found = attention.load()
    assert found.library is None and 'CC is "gcc \'x"' in found.reason and "\n" not in found.reason
    close(query_key(given), functional.scaled_dot_product_attention(*given), 1e-6)


def test_without_any_compiler_the_reason_says_so(rebuilt, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(rebuilt))
    assert attention.load() == (None, "no C compiler was found")


LOAD = "from open_gem.method.kernels import attention; print(attention.load().library is not None)"


def broken(content: bytes, how: str) -> bytes:
    if how == "cut off":
        return content[: len(content) // 2]
    if how == "with a hole":  # as after a power cut: the length is right, and some blocks never came to the disk
        return content[:4096] + bytes(len(content) - 4096)
    if how == "one bit":
        return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    return {"empty": b"", "something else": b"not a library"}[how]


@pytest.mark.parametrize("how", ["cut off", "with a hole", "one bit", "empty", "something else"])
def test_a_broken_file_in_the_cache_is_built_again_and_never_loaded(how, rebuilt, kernel):
    """In a process of its own: part of a library would end this one."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(rebuilt.parent)}
    attention.load()
    [made] = rebuilt.iterdir()
    content = made.read_bytes()
    made.unlink()  # this process has it mapped
    made.write_bytes(broken(content, how))
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    [again] = rebuilt.iterdir()
    assert len(again.read_bytes()) == len(content)


def test_a_library_is_safe_on_disk_before_it_has_its_name(rebuilt, kernel, monkeypatch):
    synced: list[bool] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(not list(rebuilt.glob("*.so"))) or sync(file))
    next(rebuilt.iterdir()).unlink()
    attention.load.cache_clear()
    attention.load()
    assert synced == [True]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "change",
    {
        "float64": lambda p: p.double(),
        "bfloat16": lambda p: p.bfloat16(),
        "not on a CPU": lambda p: p.to("meta"),
        "width not next to each other": lambda p: p.transpose(2, 3).contiguous().transpose(2, 3),
        "fewer tokens": lambda p: p[:, :, :-1],
    }.items(),
    ids=lambda change: change[0],
)
def test_nothing_else_comes_to_native_code(change):
    """Whatever let it pass before."""
    given = heads()
    for at in range(3):
        q, k, v = (change[1](p) if at == index else p for index, p in enumerate(given))
        with pytest.raises(TypeError, match="the kernel got"):
            attention._attend((q, k), v, torch.ones(2), attention.QUERY_KEY)
    for inverse in (
        torch.ones(2, dtype=torch.float64),
        torch.ones(2, device="meta"),
        torch.ones(1),
        torch.ones(4)[::2],
    ):
        with pytest.raises(TypeError, match="the kernel got"):
            attention._attend([given.q], given.v, inverse, 1)


def test_nothing_is_run_from_a_folder_that_others_can_write_to(rebuilt, kernel):
    rebuilt.chmod(0o777)
    kept = list(rebuilt.iterdir())
    for path in kept:
        path.unlink()
    attention.load.cache_clear()
    assert attention.load().library is not None
    assert list(rebuilt.iterdir()) == []


def test_a_user_without_a_home_is_no_unsupported_reason(rebuilt, kernel, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    attention.load.cache_clear()
    assert attention.load().library is not None


def test_a_home_that_cannot_be_written_to_is_no_unsupported_reason(rebuilt, kernel, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert attention.load().library is not None


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-O1"])
def test_a_lesser_processor_gives_the_same(flag, rebuilt, monkeypatch):
    monkeypatch.setattr(attention, "FLAGS", (*attention.FLAGS, flag))
    if attention.load().library is None:
        pytest.skip(attention.load().reason)
    given = heads(n=130, c=72)
    ours = (attention.self_self(list(given), given.v, 4.0, 1), attention.query_key(*given))
    monkeypatch.setenv(kernels.SWITCH, "0")
    close(ours[0], self_self(list(given), given.v, 4.0, normalize=True, iterations=1), 2e-6)
    close(ours[1], query_key(given), 2e-6)


PEAK = """
import sys, open_clip, torch
from pathlib import Path
from open_gem import METHODS, run
from open_gem.towers.open_clip import read_tower

config = open_clip.CLIPVisionCfg(image_size=224, layers=2, width=384, head_width=64, patch_size=16)
tower = read_tower(open_clip.model._build_vision_tower(24, config).eval(), "test")
method = {"gem": METHODS["gem"].replace(depth=2)}
for side in map(int, sys.argv[1:]):
    run(tower, torch.zeros(1, 3, side, side), method)
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("switch", ["0", "1"])
@pytest.mark.slow
def test_peak_memory_is_linear_in_the_number_of_patches_up_to_896_pixels(switch):
    """785 tokens, then 3,137: four times as many may take four times as much, not sixteen."""
    command = [sys.executable, "-c", PEAK, "64", "448", "896"]
    environment = {**os.environ, kernels.SWITCH: switch, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    start, middle, most = map(int, done.stdout.split())
    assert most - start < 6 * (middle - start)


# Linear layers --------------------------------------------------------------------------------------------------------


def network(kind: str) -> nn.Module:
    from open_clip.transformer import QuickGELU
    from timm.layers.mlp import Mlp
    from transformers.models.clip.configuration_clip import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPMLP
    from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMLP

    def sequential(activation: nn.Module, bias: bool = True) -> nn.Module:
        layers = {"c_fc": nn.Linear(16, 64, bias), "gelu": activation, "c_proj": nn.Linear(64, 16, bias)}
        module = nn.Sequential()
        for name, layer in layers.items():
            module.add_module(name, layer)
        return module

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module = {
            "open_clip": lambda: sequential(nn.GELU()),
            "open_clip, tanh": lambda: sequential(nn.GELU(approximate="tanh")),
            "OpenAI": lambda: sequential(QuickGELU()),
            "OpenAI, no bias": lambda: sequential(QuickGELU(), bias=False),
            "timm": lambda: Mlp(16, 64),
            "transformers' CLIP": lambda: CLIPMLP(CLIPVisionConfig(**sizes)),
            "transformers' CLIP, GELU": lambda: CLIPMLP(CLIPVisionConfig(**sizes, hidden_act="gelu")),
            "SigLIP": lambda: SiglipMLP(SiglipVisionConfig(**sizes)),
        }[kind]()
    return module.eval().requires_grad_(False)


KINDS = [
    "open_clip",
    "open_clip, tanh",
    "OpenAI",
    "OpenAI, no bias",
    "timm",
    "transformers' CLIP",
    "transformers' CLIP, GELU",
    "SigLIP",
]


@pytest.fixture
def small_layers(monkeypatch) -> None:
    monkeypatch.setattr(linear, "MIN_WEIGHTS", dict.fromkeys(linear.MIN_WEIGHTS, 0))


def is_fused(module: nn.Module, x: Tensor) -> bool:
    """Whether the layers of `module` are read past when it is read as a feed-forward network."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module), "forward", lambda *_: calls.append(1))
        linear.feed_forward(module)(x)
    return not calls


@pytest.fixture
def inputs() -> Tensor:
    return 3 * torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))


def needs_onednn(test):
    """Mark a test of layers that are small, and taken all the same."""
    skip = pytest.mark.skipif(not linear.HAS_ONEDNN, reason="torch has no fused linear layer for this processor")
    return skip(pytest.mark.usefixtures("small_layers")(test))


@torch.no_grad()
def test_small_layers_are_left_to_torch(inputs, monkeypatch):
    assert not is_fused(network("open_clip"), inputs)
    monkeypatch.setitem(linear.MIN_WEIGHTS, torch.float32, 16 * 64)
    assert is_fused(network("open_clip"), inputs) == linear.HAS_ONEDNN


@torch.no_grad()
def test_float32_is_left_to_torch_where_mkl_is_fast():
    large = torch.nn.Linear(512, 512)
    x = torch.randn(4, 512)
    assert linear._takes(x, large.weight, large.bias) == (linear.HAS_ONEDNN and not linear.HAS_FAST_MKL)
    assert linear._takes(x.bfloat16(), large.bfloat16().weight) == linear.HAS_ONEDNN


@needs_onednn
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_feed_forward_network_is_fused_in_bfloat16_too(kind, inputs):
    module = network(kind).bfloat16()
    x = inputs.bfloat16()
    assert is_fused(module, x)
    exact = network(kind).double()
    exact.load_state_dict(module.state_dict())
    close_to_bfloat16(linear.feed_forward(module)(x), exact(x.double()))


@needs_onednn
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_feed_forward_network_of_a_known_kind_is_fused_and_the_same(kind, inputs, monkeypatch):
    module = network(kind)
    expected = module(inputs)
    close(linear.feed_forward(module)(inputs), expected, 5e-6)
    monkeypatch.setitem(linear.MAX_VALUES, torch.float32, 64 * 5)  # five rows at a time
    close(linear.feed_forward(module)(inputs), expected, 5e-6)
    assert is_fused(module, inputs)


@needs_onednn
@torch.no_grad()
def test_weights_are_read_at_every_call(inputs):
    module = network("open_clip")
    forward = linear.feed_forward(module)
    forward(inputs)
    module.c_fc.weight.mul_(2)  # type: ignore[union-attr, operator]
    close(forward(inputs), module(inputs), 5e-6)


class Odd(nn.Parameter):
    """A subclass, as libraries that quantise or spread weights have them."""


def another_between(module: Any) -> None:
    module.add_module("extra", nn.Linear(16, 16))


@needs_onednn
@pytest.mark.parametrize(
    "change",
    {
        "a hook": lambda module: module.c_fc.register_forward_hook(lambda *_: None),
        "a hook on all": lambda module: module.register_forward_pre_hook(lambda *_: None),
        "training": lambda module: module.train(),
        "something else inside": another_between,
        "a child in training": lambda module: module.gelu.train(),
        "another forward": lambda module: vars(module.c_fc).update(forward=lambda x: x),
        "weights of another kind": lambda module: module.c_fc.register_parameter("weight", Odd(module.c_fc.weight)),
        "weights elsewhere": lambda module: module.c_proj.to("meta"),
        "another activation": lambda module: module.add_module("gelu", nn.ELU()),
        "another kind of layer": lambda module: module.add_module("c_fc", nn.Sequential(module.c_fc)),
        "float16": lambda module: module.half(),
    }.items(),
    ids=lambda change: change[0],
)
@torch.no_grad()
def test_a_network_that_is_not_plain_runs_as_it_is(change, inputs):
    module = network("open_clip")
    change[1](module)
    assert not is_fused(module, inputs.to(module.c_proj.weight.dtype))  # type: ignore[union-attr, arg-type]


@needs_onednn
@torch.no_grad()
def test_hooks_on_every_module_and_autocast_are_heard(inputs):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not is_fused(network("open_clip"), inputs)
    finally:
        handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fused(network("open_clip"), inputs)
    assert is_fused(network("open_clip"), inputs)


@needs_onednn
def test_gradients_flow_as_ever(inputs):
    module = network("open_clip").requires_grad_()
    assert not is_fused(module, inputs)
    with torch.no_grad():
        assert is_fused(network("open_clip"), inputs)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_linear_layer_is_the_same_and_counted(bias, inputs):
    layer = nn.Linear(16, 24, bias)
    with FlopCounterMode(display=False) as counter:
        ours = linear.apply(layer, inputs)
    assert counter.get_total_flops() == 2 * 2 * 9 * 16 * 24
    close(ours, layer(inputs), 2e-6)


@torch.no_grad()
def test_the_switch_turns_all_off(inputs, monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, "0")
    assert not is_fused(network("open_clip"), inputs)
    assert not attention.fits(1.0, *heads())
    layer = nn.Linear(16, 24)
    assert torch.equal(linear.apply(layer, inputs), layer(inputs))

"""Every launch of the networks at every size and batch: arithmetic on what Metal allows."""

import mlx.core as mx
import pytest

from fastvlm_mlx.ops import metal_linear, metal_stem
from fastvlm_mlx.vision import AttentionBlock, Depthwise, FastViTHD
from tests.metal.launches import INT, NETWORKS, build, recording

SIZES = [
    *((side, side) for side in (64, 128, 256, 512, 768, 1024, 1536, 2048)),
    *((448, 320), (64, 2048), (1280, 192)),
]
BATCHES = (1, 2, 5, 16, 17, 64)
PIXELS = 17 * 1024**2  # the most at once that is in use: tiles of 4x4 at 1024, and their overview

# A pipeline whose threads need all registers they may have takes 384 threads on an M1.
THREADS = 384


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("form", [0, 1], ids=["likeliest", "second"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_every_launch_is_legal(
    monkeypatch: pytest.MonkeyPatch, network: str, form: int, dtype: mx.Dtype
) -> None:
    tower = FastViTHD(NETWORKS[network])
    convolutions = sum(isinstance(m, Depthwise) for m in tower.modules())
    attentions = sum(isinstance(m, AttentionBlock) for m in tower.modules())
    for height, width in SIZES:
        for batch in BATCHES if dtype == mx.float16 else (1, 17):
            where = (height, width, batch)
            with recording(monkeypatch, form) as launches:
                build(tower, batch, height, width, dtype)
            names = [launch.name for launch in launches]
            if batch * height * width <= PIXELS:
                assert sum("depthwise" in n for n in names) == convolutions, where
                assert sum("attention" in n for n in names) == attentions, where
                assert sum("stem" in n for n in names) == 1, where
            for launch in launches:
                what = (*where, launch.name, launch.call["template"])
                x, y, z = launch.group
                assert 0 < x * y * z <= THREADS, what
                assert all(0 < n < INT for n in launch.grid), what
                assert launch.largest_index < INT, what
                assert launch.threadgroup_memory <= 32 * 1024, what
                assert all(a.size >= 8 for a in launch.inputs), "else it is `constant` memory"
                if "threadgroup_barrier" in launch.definition["source"]:
                    whole = [g % t for g, t in zip(launch.grid, launch.group, strict=True)]
                    assert whole == [0, 0, 0], what


def test_threadgroup_memory_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording(monkeypatch) as launches:
        x, w, b = (mx.zeros(s, mx.float16) for s in ((64, 64), (64, 64), (64,)))
        metal_linear.run(x, w, b)
        metal_linear.run(*(a.astype(mx.float32) for a in (x, w, b)))
        metal_stem.run(mx.zeros((1, 8, 8, 3)), mx.zeros((256, 3, 3, 3)), mx.zeros(256))
    memory = [launch.threadgroup_memory for launch in launches]
    assert memory == [2 * 64 * (40 + 36), 4 * 64 * (24 + 20), 27 * 256 * 4]


@pytest.mark.parametrize(
    ("batch", "side", "fits"), [(64, 1024, True), (80, 2048, True), (700, 1024, False)]
)
def test_the_stem_fits_what_its_indices_reach(batch: int, side: int, fits: bool) -> None:
    """Pixels are counted in elements, outputs in vectors of four."""
    x, w, b = mx.zeros((batch, side, side, 3)), mx.zeros((96, 3, 3, 3)), mx.zeros(96)
    answer = metal_stem.fits(x, w, b)
    assert answer is fits

"""Time every part of a model by itself, for the roofline."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from fastvlm_mlx.config import Config
from fastvlm_mlx.model import Network, flat_parameters

from .chips import peaks_of
from .clock import timed
from .machine import process_memory
from .record import OURS, Measurement
from .roofline import encoder_work, floors_of, language_work, limit_measurement, roofline_lines
from .session import Keeper
from .subjects import Choice, build, describe

__all__ = ["measure_parts", "measure_roofline"]


def measure_roofline(
    choice: Choice, size: int, repeat: int, keeper: Keeper, tick: Callable[[str], None]
) -> list[str]:
    """Measure into the record of `keeper` and return the table.

    `size` is a multiple of 64. Raises what `subjects.build` raises.
    """
    tick("building the model")
    vlm = build(choice)
    config, network = vlm.config, vlm.network
    keeper.record = replace(keeper.record, subject=describe(choice, vlm))
    dtype = network.vision.stem.conv.weight.dtype
    weights = sum(array.nbytes for _, array in flat_parameters(network.language_model))
    item = network.language_model.model.norm.weight.dtype.size
    work = {
        **encoder_work(config.vision, size, dtype),
        **language_work(config, size, item, weights),
    }
    tick("the limits of this machine")
    peaks = peaks_of(keeper.record.machine, dtype)
    measured = measure_parts(network, config, size, repeat, tick)
    keeper.add(measured)
    keeper.add(limit_measurement(floors_of(work, peaks), measured, peaks))
    return list(roofline_lines(measured, work, peaks))


@dataclass(frozen=True)
class _Part:
    name: str
    run: Callable[[], Any]
    """Returns arrays, which the clock waits for."""


def measure_parts(
    network: Network, config: Config, side: int, repeat: int, tick: Callable[[str], None]
) -> Measurement:
    """Seconds of stem, stages, head, the encoder as one, projector, prefill and a decoded token.

    Every part gets evaluated inputs and is run once before it is timed. `tick` is told its name.
    """
    seconds: dict[str, tuple[float, ...]] = {}
    mx.reset_peak_memory()
    for part in _parts(network, side):
        tick(part.name)
        timed(part.run)
        seconds[part.name] = tuple(timed(part.run)[0] for _ in range(repeat))
    return Measurement(
        kind="roofline",
        implementation=OURS,
        image_size=side,
        image_tokens=config.vision.tokens(side, side),
        prompt_tokens=None,
        answer_tokens=None,
        seconds=seconds,
        peak_memory=mx.get_peak_memory(),
        process_memory=process_memory(),
        launches=None,
        moved=None,
    )


def _parts(network: Network, side: int) -> Iterator[_Part]:
    tower = network.vision
    pixels = mx.random.uniform(shape=(1, side, side, 3), key=mx.random.key(0))
    pixels = pixels.astype(tower.stem.conv.weight.dtype)
    mx.eval(pixels)
    x = pixels
    stages = ((f"stage{number}", stage) for number, stage in enumerate(tower.stages, start=1))
    for name, step in (("stem", tower.stem), *stages, ("head", tower.head)):
        yield _Part(name, _call(step, x))
        x = step(x)
        mx.eval(x)
    yield _Part("encoder", _call(tower, pixels))
    features = x.reshape(1, -1, x.shape[-1])
    yield _Part("projector", _call(network.projector, features))
    text_dtype = network.language_model.model.norm.weight.dtype
    yield from _language_parts(network, network.projector(features).astype(text_dtype))


def _language_parts(network: Network, embeddings: mx.array) -> Iterator[_Part]:
    cache: Any = network.new_cache()
    mx.eval(embeddings, network.prefill(embeddings, cache))
    length = cache[0].offset

    def decode() -> mx.array:
        for layer in cache:  # the token before is forgotten
            layer.trim(layer.offset - length)
        return network.decode(mx.array([0]), cache)

    yield _Part("prefill", lambda: network.prefill(embeddings, network.new_cache()))
    yield _Part("decode", decode)


def _call(function: Callable[[mx.array], mx.array], argument: mx.array) -> Callable[[], mx.array]:
    """Compiled where the library compiles it: MLX's CPU backend gains nothing from it."""
    on_gpu = mx.default_device() == mx.gpu
    called: Callable[[mx.array], mx.array] = mx.compile(function) if on_gpu else function
    return lambda: called(argument)

"""Sweeps: which configurations are timed, how they are written, what selection loses."""

import math

import pytest

from jax_deepgemm import legal_configs, select_config
from jax_deepgemm.cli.compare import row_key
from jax_deepgemm.cli.shapes import NAMED_SHAPES, Shape
from jax_deepgemm.cli.sweep import (
    config_text,
    contenders,
    parse_config_text,
    regret_text,
    sweep_table,
)
from jax_deepgemm.device import Gpu
from jax_deepgemm.ffi import _native

H100: Gpu = {"num_sms": 132, "memory_gbs": 3352}


@pytest.mark.parametrize("shape", NAMED_SHAPES["seed"][::5], ids=str)
def test_contenders(shape: Shape) -> None:
    legal = legal_configs(**shape.selection, **H100)
    assert contenders(shape, H100, math.inf) == legal
    near = contenders(shape, H100, 1.2)
    assert len(near) < len(legal) and set(near) < set(legal)
    # A factor of 1 leaves the selected one, and what is estimated exactly as long.
    assert select_config(**shape.selection, **H100) == contenders(shape, H100, 1)[0]


def test_a_config_is_written_as_in_kernel_names() -> None:
    shape = NAMED_SHAPES["seed"][0]
    problem = (0, 1, shape.m, 0, shape.n, shape.k, 132, 0, 0, 0, 3352)
    for config in legal_configs(**shape.selection, **H100):
        assert _native.kernel_name(problem, config.fields).endswith(f"_{config_text(config)}")
        assert parse_config_text(config_text(config)) == config


@pytest.mark.parametrize("text", ["", "64x32_s8_w1_c1x1x4", "64x32_s8_w1_c1x1x4_r8 "])
def test_what_is_no_config(text: str) -> None:
    with pytest.raises(ValueError, match="is not a configuration like 64x32_s8_w1_c1x1x4_r8"):
        parse_config_text(text)


def test_regret() -> None:
    shapes = [Shape.dense(64, 8, 16), Shape("ragged", 8, 64, 8, 16)]
    keys = [row_key(shape._asdict()) for shape in shapes]
    text = regret_text(dict(zip(keys, (0.21, 0.0), strict=True)))
    assert "over 2 shapes: geometric mean 10.00%, worst 21.0% at 64x8x16" in text
    assert regret_text({}) == "no shape has a right result"
    (caption,) = {sweep_table([shape._asdict() | {"sweep": {}} for shape in shapes]).caption}
    assert caption == "no shape has a right result"

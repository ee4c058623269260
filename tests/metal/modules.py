"""The modules of fastvlm_mlx.ops; some names in the package itself are those of functions."""

import importlib
import pkgutil

import fastvlm_mlx.ops

MODULES = [
    importlib.import_module(f"fastvlm_mlx.ops.{module.name}")
    for module in pkgutil.iter_modules(fastvlm_mlx.ops.__path__)
]

attention_module = importlib.import_module("fastvlm_mlx.ops.attention")
depthwise_module = importlib.import_module("fastvlm_mlx.ops.depthwise")
gelu_module = importlib.import_module("fastvlm_mlx.ops.gelu")

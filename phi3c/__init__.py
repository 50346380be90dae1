"""phi3c: an ahead-of-time compiler and runtime for the Phi-3 family.

`compile` turns a checkpoint into an artifact folder, `load` runs one. Both are imported when first
used, so that loading an artifact does not import the compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifact import Artifact as Artifact
    from .artifact import ConvertedWeights as ConvertedWeights
    from .compiler import compile as compile
    from .config import Phi3Config as Phi3Config
    from .converter import convert as convert
    from .engine.async_engine import AsyncEngine as AsyncEngine
    from .engine.draft_model import DraftModel as DraftModel
    from .engine.engine import Engine as Engine
    from .engine.grammar import Grammar as Grammar
    from .engine.grammar import GrammarLimits as GrammarLimits
    from .engine.prompt_lookup import PromptLookup as PromptLookup
    from .engine.request import Request as Request
    from .engine.sampler import SamplingParams as SamplingParams
    from .runtime.compiled import CompiledPhi3 as CompiledPhi3
    from .runtime.compiled import load as load
    from .runtime.kv_cache import PagedKVCache as PagedKVCache
    from .runtime.loaded_adapters import Adapter as Adapter

_HOME = {
    "Artifact": ".artifact",
    "ConvertedWeights": ".artifact",
    "compile": ".compiler",
    "convert": ".converter",
    "Phi3Config": ".config",
    "AsyncEngine": ".engine.async_engine",
    "DraftModel": ".engine.draft_model",
    "Engine": ".engine.engine",
    "Grammar": ".engine.grammar",
    "GrammarLimits": ".engine.grammar",
    "PromptLookup": ".engine.prompt_lookup",
    "Request": ".engine.request",
    "SamplingParams": ".engine.sampler",
    "CompiledPhi3": ".runtime.compiled",
    "load": ".runtime.compiled",
    "PagedKVCache": ".runtime.kv_cache",
    "Adapter": ".runtime.loaded_adapters",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'phi3c' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value

"""Every error that a user of phi3c can meet: a closed set, one base class.

Each also derives from the builtin it refines, so code that knows nothing of phi3c can catch it.
"""

from __future__ import annotations


class Phi3CError(Exception):
    """Base of all errors that phi3c raises on purpose."""


class ConfigError(Phi3CError, ValueError):
    """A model configuration is missing, unreadable, or asks for something not supported."""


class CheckpointError(Phi3CError, ValueError):
    """Weight or tokenizer files are missing, damaged, or do not fit the configuration."""


class ArtifactError(Phi3CError, ValueError):
    """A compiled artifact is broken, foreign, or of another format version."""


class TargetError(Phi3CError, ValueError):
    """A compilation target is unknown, or cannot be built or run here."""


class SchemeError(Phi3CError, ValueError):
    """A quantization scheme is unknown, or does not fit the model or the target."""


class InputError(Phi3CError, ValueError):
    """A caller's input is malformed: bad token ids, an empty prompt, a wrong shape."""


class AdapterError(Phi3CError, ValueError):
    """An adapter's files are missing, damaged or not supported, or do not fit the model; or its
    name is unknown or taken."""


class AdapterInUseError(Phi3CError, RuntimeError):
    """An adapter that is to be unloaded has requests that have not ended."""


class DeviceError(Phi3CError, RuntimeError):
    """A device, its driver or its runtime library is missing, does not suffice, or has failed."""


class OutOfMemoryError(Phi3CError, MemoryError):
    """The machine or the device has not the memory that is asked for."""


class CacheFullError(Phi3CError, RuntimeError):
    """The KV cache has no free page left for the tokens of this forward."""


class ContextLengthError(Phi3CError, ValueError):
    """A sequence would grow longer than the context that the artifact was compiled for."""


class SequenceError(Phi3CError, ValueError):
    """A sequence id is unknown or already taken, or cannot be popped or forked as asked."""


class RopeFactorError(Phi3CError, RuntimeError):
    """A forward would carry a short-factor sequence past original_max_position_embeddings."""

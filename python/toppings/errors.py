# SPDX-License-Identifier: Apache-2.0
"""Every error toppings raises on purpose, so that a caller can tell them apart by class.

A message reads ``what: expected X, got Y (where)``.
"""

__all__ = [
    "AdapterFormatError",
    "AdapterMismatchError",
    "CancelledError",
    "CapacityError",
    "DeviceError",
    "FileError",
    "InvalidArgumentError",
    "InvalidRequestError",
    "RequestFailedError",
    "SlotsBusyError",
    "StoreFullError",
    "ToppingsError",
    "UnknownAdapterError",
    "UnsupportedAdapterError",
    "UnsupportedModelError",
]


class ToppingsError(Exception):
    """Base class of all of them."""


class InvalidArgumentError(ToppingsError, ValueError):
    """An argument of a library call is out of its range or of the wrong shape."""


class AdapterFormatError(ToppingsError, ValueError):
    """An adapter's files are missing, damaged or contradict each other."""


class UnsupportedAdapterError(ToppingsError, ValueError):
    """An adapter is well-formed but uses a feature that toppings refuses by name."""


class AdapterMismatchError(ToppingsError, ValueError):
    """An adapter doesn't fit the base model: a module is missing there or has another shape."""


class UnsupportedModelError(ToppingsError, ValueError):
    """A base model has a part that cannot be served correctly."""


class UnknownAdapterError(ToppingsError, LookupError):
    """No adapter of that name or digest is registered."""


class InvalidRequestError(ToppingsError, ValueError):
    """A request could never be served: bad sampling parameters, or a prompt beyond all capacity."""


class RequestFailedError(ToppingsError, RuntimeError):
    """A request ended in an error of its own, such as an adapter whose logits aren't finite."""


class CapacityError(ToppingsError, RuntimeError):
    """Something that fits in principle doesn't fit now."""


class StoreFullError(CapacityError):
    """The host store's byte budget is taken by adapters in use."""


class SlotsBusyError(CapacityError):
    """Every slot, or every range of the arena that is large enough, is taken by adapters in use."""


class DeviceError(ToppingsError, RuntimeError):
    """A device or its driver is missing or reported a failure."""


class FileError(ToppingsError, OSError):
    """A file can't be opened, read or written."""


class CancelledError(ToppingsError, RuntimeError):
    """Somebody asked for the operation to stop before it was through."""

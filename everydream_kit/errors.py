"""The errors that the kit raises on purpose. Each message says what was found, where, and what to do.

    KitError
    ├── ConfigError          a setting or a file of settings is wrong
    ├── DataError            the dataset cannot be used
    ├── ModelError           the base model cannot be found, read or understood
    ├── CheckpointError      a checkpoint is missing, damaged, or does not fit
    ├── NonFiniteLossError   the loss or a gradient became NaN or infinite; nothing was updated
    ├── MemoryLimitError     the device ran out of memory; the message lists what to lower
    ├── DiskSpaceError       there is not enough free disk for what was about to be written
    ├── HostError            Colab, RunPod or Vast refused something, such as mounting Google Drive
    ├── JobError             a training process cannot be started, found or stopped
    └── ExportError          a file or an upload could not be made
        └── HubError         the Hugging Face Hub refused, or could not be reached

Everything else that escapes is a bug in the kit.
"""

import errno


class KitError(Exception):
    """Base of everything below: a problem that the user can fix. Faces print it without a traceback."""


class ConfigError(KitError):
    """A setting, or a file of settings, is wrong."""


class DataError(KitError):
    """The dataset cannot be used."""


class ModelError(KitError):
    """The base model cannot be found, read or understood."""


class CheckpointError(KitError):
    """A checkpoint is missing, damaged, or does not fit this run."""


class NonFiniteLossError(KitError):
    """A loss or a gradient became NaN or infinite. Nothing was updated in that step, so the weights are still good."""


class MemoryLimitError(KitError):
    """The device ran out of memory."""


class DiskSpaceError(KitError):
    """Not enough free disk for what was about to be written."""


WAITED_FOR = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, getattr(errno, "ESTALE", errno.EIO)})
"""Errors of a disk that may pass: it is full, over quota, or gone for a moment. Others stay until a person acts."""


def may_pass(error: BaseException) -> bool:
    """Whether a failed write is worth trying again: the disk is full, or gone for a moment."""
    cause = error.__cause__ if isinstance(error, DiskSpaceError) else error
    if isinstance(cause, OSError):
        return cause.errno in WAITED_FOR
    return isinstance(error, DiskSpaceError)  # refused beforehand: too little space


class HostError(KitError):
    """The host refused something: Drive could not be mounted, or this is not the host that was expected."""


class JobError(KitError):
    """A training process cannot be started, found or stopped."""


class ExportError(KitError):
    """A file or an upload could not be made."""


class HubError(ExportError):
    """The Hugging Face Hub refused a request, or could not be reached."""

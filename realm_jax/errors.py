"""Everything that realm_jax raises on purpose.

    RealmError
    ├── ModelFileError     a GGUF file, adapter or chat template is broken or hostile
    ├── UnsupportedError   a valid thing that this version does not serve
    ├── RequestError       a bad parameter, or a prompt that does not fit
    ├── CapacityError      no room now: queue full, memory budget reached
    └── DownloadError      a model reference could not be turned into a local file

A message names the value, the limit and the remedy:
``prompt is 5,120 tokens; the context is 4,096 (raise --ctx-size)``.
"""


class RealmError(Exception):
    """Base of all errors that a user can cause and mend."""


class ModelFileError(RealmError):
    """The file is broken: names the file, the field and its value."""


class UnsupportedError(RealmError):
    """The thing asked for is valid but not served here: names it and an alternative."""


class RequestError(RealmError, ValueError):
    """The request is wrong: names the parameter, its value and the limit."""


class CapacityError(RealmError):
    """The request is right but there is no room for it now."""


class DownloadError(RealmError):
    """No source gave the file: names each source and its reason."""

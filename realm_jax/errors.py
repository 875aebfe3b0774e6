"""Everything that realm_jax raises on purpose.

    RealmError
    ├── ModelFileError     a GGUF file, adapter or chat template is broken or hostile
    ├── UnsupportedError   a valid thing that this version does not serve
    ├── RequestError       a bad parameter, or a prompt that does not fit
    ├── CapacityError      no room now: queue full, memory budget reached
    │   └── LimitError     a tenant's own limit is reached; `retry_after` says when to come again
    ├── AuthenticationError  nobody knows who asks: no API key, or one that does not count
    ├── AccessError        the tenant is known and may not have this
    ├── KeyFileError       the file of API keys is broken, or open to others
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


class LimitError(CapacityError):
    """The tenant's own limit is reached. retry_after: seconds after which the same may be asked again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class AuthenticationError(RealmError):
    """It is not known who asks. The message never has the key."""


class AccessError(RealmError):
    """The tenant may not have this: names the tenant and the thing."""


class KeyFileError(RealmError):
    """The file of API keys cannot be used: names the file and the remedy."""


class DownloadError(RealmError):
    """No source gave the file: names each source and its reason."""

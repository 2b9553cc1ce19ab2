"""The errors that open_gem raises, as a tree. Every message says what was given, what is expected and what to do.

OpenGemError
├── InputError (also ValueError)     something the caller passed
│   ├── ImageError                   an image that cannot be read or is impossible
│   ├── PromptError                  prompts that cannot be located
│   ├── MethodError                  an unknown method or impossible settings of one
│   └── DatasetError                 an unknown data set, or files of one that are missing or not as they should be
├── ModelError                       a model that cannot be used
│   ├── UnknownModelError            no such name or tag
│   ├── WeightsError                 weights missing, unreachable or not fitting
│   ├── UnsupportedModelError        an architecture that open_gem cannot read
│   └── NotFiniteError               a model whose numbers are infinite or not a number
└── OutputError                      results that cannot be written

OpenGemWarning (also UserWarning)    results that are not to be trusted
"""


class OpenGemError(Exception):
    """Base of all errors that open_gem raises on purpose; `str(error)` is one line for a person."""


class InputError(OpenGemError, ValueError):
    """Something the caller passed is wrong."""


class ImageError(InputError):
    """An image that cannot be read or is impossible."""


class PromptError(InputError):
    """Prompts that cannot be located."""


class MethodError(InputError):
    """An unknown method, or impossible settings of one."""


class DatasetError(InputError):
    """An unknown data set, or files of one that are missing or not as they should be."""


class ModelError(OpenGemError):
    """A model that cannot be used."""


class UnknownModelError(ModelError):
    """No such model name or pretrained tag."""


class WeightsError(ModelError):
    """Weights that are missing, unreachable or do not fit."""


class UnsupportedModelError(ModelError):
    """An architecture that open_gem cannot read, with the reason."""


class NotFiniteError(ModelError):
    """A model whose features or embeddings are infinite or not a number, with the likely cause."""


class OutputError(OpenGemError):
    """Results that cannot be written."""


class OpenGemWarning(UserWarning):
    """Results that are not to be trusted, such as those for photographs from a model that knows drawn objects alone."""

"""Every error that Lazarus raises on purpose.

    LazarusError                     exit code 1: the run failed
    ├── UsageError                   exit code 2: the command line, or a call, is wrong
    │   ├── PromptsError             no prompt, an unreadable prompt file, a row without its field
    │   ├── OutputError              a path that cannot be written, a format that is not there
    │   ├── ResultFileError          a saved result that cannot be read back
    │   └── MissingPackageError      an optional package that this input or output needs
    ├── ModelError                   one of the two models cannot be used
    │   ├── ModelNotFoundError       no such folder, file or Hub id; gated; offline
    │   ├── WeightsError             missing, truncated, pickled or unreadable weights
    │   ├── AdapterError             an adapter that does not fit its model
    │   ├── BlocksNotFoundError      the blocks cannot be found without `layers_path`
    │   ├── RecordingError           a recording that is damaged, cut short, or of a later version
    │   └── UnsupportedModelError    an architecture, quantisation or custom code that is refused
    ├── PairError                    the two models cannot be compared with each other
    │   ├── TokenizerMismatchError   different token ids for the same prompt
    │   └── ShapeMismatchError       different depth or width
    ├── PromptDataError              a prompt that these models cannot take
    │   ├── PromptTooLongError       longer than the context
    │   ├── PositionError            without the token that `position` asks for
    │   └── ChatTemplateError        a chat template that is absent or fails
    ├── NoDataError                  not one finite pair of states
    ├── DeviceError                  a device that is absent, or out of memory
    ├── SaveError                    the disk gave out on the way
    └── GateNotMetError              exit code 3: the results are saved, a gate says no

Each message says what was wrong, where, with which values, and what to do about it. It names options as
Python does, `dtype="float32"`; the command line, which reads `marked`, names them as they are typed.
"""

from __future__ import annotations

from lazarus.messages import in_python


class LazarusError(Exception):
    """The root: whatever stops a run. `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __init__(self, message: str = "", *, option: str | None = None) -> None:
        super().__init__(in_python(message))
        self.option = option
        """the Python name of the option that it is about; None where it is about none"""
        self.marked = message
        """the message with its options marked, for whoever spells them in another way"""


class UsageError(LazarusError):
    """The command line or the call is wrong; nothing was run."""

    exit_code = 2


class PromptsError(UsageError):
    """The prompts cannot be read: nothing there, not UTF-8, a row without its field."""


class OutputError(UsageError):
    """A result cannot be written to this path, or not in this format."""


class ResultFileError(UsageError):
    """A saved result cannot be read: no such file, no result, or one of another schema version."""


class MissingPackageError(UsageError):
    """An optional package is needed and not installed."""


class ModelError(LazarusError):
    """One of the two models cannot be used."""


class ModelNotFoundError(ModelError):
    """No such folder, file or Hub id, or no access to it."""


class WeightsError(ModelError):
    """The weights are missing, truncated, pickled, or cannot be read."""


class AdapterError(ModelError):
    """An adapter does not fit the model it is put on."""


class BlocksNotFoundError(ModelError):
    """The model's blocks cannot be found, or do not run as blocks."""


class RecordingError(ModelError):
    """A recording is damaged, cut short, of a later version of the format, or lacks what is asked of it."""


class UnsupportedModelError(ModelError):
    """The architecture, quantisation or custom code is refused, with the reason."""


class PairError(LazarusError):
    """The two models cannot be compared with each other."""


class TokenizerMismatchError(PairError):
    """The two tokenizers give different ids for the same prompt."""


class ShapeMismatchError(PairError):
    """The two models have a different number of layers or another width."""


class PromptDataError(LazarusError):
    """A prompt cannot be given to these models."""


class PromptTooLongError(PromptDataError):
    """A prompt has more tokens than the models' context."""


class PositionError(PromptDataError):
    """A prompt has no token at the position asked for."""


class ChatTemplateError(PromptDataError):
    """The chat template is absent, or cannot be rendered with these prompts."""


class NoDataError(LazarusError):
    """Not one pair of states could be compared."""


class DeviceError(LazarusError):
    """The device is absent or out of memory, or lacks an operator."""


class SaveError(LazarusError):
    """A result, or the work of a run, could not be written on the way."""


class GateNotMetError(LazarusError):
    """A gate (`fail_above`, `expect`) was not met. The results were saved first."""

    exit_code = 3

"""Import path for users who ask what runs where: `from albert_fast.dispatch import resolve`. The code is in `runtime/`."""

from .runtime.dispatch import BACKENDS as BACKENDS
from .runtime.dispatch import TABLE as TABLE
from .runtime.dispatch import BackendUnavailableError as BackendUnavailableError
from .runtime.dispatch import extension as extension
from .runtime.dispatch import resolve as resolve
from .runtime.dispatch import runnable_on as runnable_on
from .runtime.dispatch import why_not as why_not

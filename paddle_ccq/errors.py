# SPDX-License-Identifier: Apache-2.0
"""User-facing errors: one line that says what is wrong, where, and what to do; exit code 2."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable


class CcqError(Exception):
    """A mistake in the input or the environment that the user can act on.

    The message is one line and names the file, tensor or flag concerned.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class CoreMissingError(CcqError):
    """The compiled core was never built, or does not load here."""


def describe_os_error(error: OSError) -> str:
    """One line for an operating-system error, naming the file where one is known."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{where}no space left on the device; free some room and run the same command again"
    return f"{where}{error.strerror or error}"


def run_cli(main: Callable[[], int]) -> int:
    """Run a command's body; expected failures become one line on stderr and exit code 2.

    Anything else is a defect of ours and keeps its traceback.
    """
    try:
        return main()
    except CcqError as error:
        message = str(error)
    except BrokenPipeError:
        # The reader of our output (head, less) went away; that is not an error of this command.
        sys.stderr.close()
        return 0
    except OSError as error:
        message = describe_os_error(error)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 2

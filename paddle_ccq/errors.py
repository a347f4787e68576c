# SPDX-License-Identifier: Apache-2.0
"""User-facing errors: one line that says what is wrong, where, and what to do; exit code 2."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable

from .streams import OutputLost, guarded

# Control characters that are no white space, and those that reverse the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]")


class CcqError(Exception):
    """A mistake in the input or the environment that the user can act on.

    The message is one line and names the file, tensor or flag concerned.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(visible(message).split()))


def visible(text: str) -> str:
    """The text with control characters written out, so that a terminal does not obey them.

    White space stays, and so does everything that only joins letters.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def readable(name: str | os.PathLike[str]) -> str:
    """A file's name as one line of text that any file can hold.

    A name is bytes to the system. Where the locale cannot read them, Python holds them in a form
    that no encoding writes; they are most likely UTF-8.
    """
    text = os.fsencode(name).decode("utf-8", "replace")
    return re.sub(r"[\t-\r\x1c-\x1f\x85\u2028\u2029]", " ", visible(text))


class CoreMissingError(CcqError):
    """The compiled core was never built, or does not load here."""


def describe_os_error(error: OSError) -> str:
    """One line for an operating-system error, naming the file where one is known."""
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no space left on the device; free some room and run the same command again"
    return f"{where}{error.strerror or error}"


def run_cli(main: Callable[[], int]) -> int:
    """Run a command's body; expected failures become one line on stderr and exit code 2.

    The exit code is the one that the work deserves, whoever reads the output: a reader that goes
    away (`| head`) or a closed stream changes nothing. Anything that is not expected is a defect
    of ours and keeps its traceback.
    """
    with guarded():
        try:
            code = main()
            sys.stdout.flush()
            return code
        except CcqError as error:
            message = str(error)
        except OutputLost as error:
            message = f"standard output: {error.strerror}; not all results could be printed"
        except OSError as error:
            message = str(CcqError(describe_os_error(error)))
        except MemoryError as error:
            message = f"not enough memory: {error}" if str(error) else "not enough memory"
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            return 130
        print(f"error: {message}", file=sys.stderr)
        return 2

# SPDX-License-Identifier: Apache-2.0
"""Arguments that commands share: one spelling and one meaning of each in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .checkpoint.source import HUBS
from .codec.row_order import ROW_ORDERS
from .encoder.base import DEVICES
from .parser import Parser, count, number, whole

__all__ = ["Arguments", "count", "number", "whole"]  # the numbers are parser.py's

# Where the parser keeps what --model said, until it is put in the place of the first argument.
_FLAG = "_model_flag"


class Arguments(Parser):
    """The parser of a command that works on a model, with a method for each shared argument."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(command, description)
        self._subject: str | None = None

    def subject(self, dest: str, help: str, metavar: str = "MODEL") -> None:
        """What the command works on: its first argument, or --model."""
        self._subject = dest
        self.add_argument(dest, nargs="?", metavar=metavar, help=help)
        self.add_argument("--model", dest=_FLAG, metavar=metavar, help="the same by a flag")

    def threads(self, what: str = "all processors by default; the result is the same") -> None:
        """A whole number; host.thread_count() refuses one that is too small or too large."""
        self.add_argument("--threads", type=whole, metavar="N", help=what)

    def source(self) -> None:
        """The hub that models are downloaded from."""
        self.add_argument(
            "--source", choices=tuple(HUBS), type=str.upper, help="hub to download models from"
        )

    def device(self, what: str = "where codes are searched; the result is the same") -> None:
        """The processor or the first NVIDIA GPU, for the one part of the work that `what` names."""
        self.add_argument("--device", choices=DEVICES, default="cpu", help=what)

    def row_order(self) -> None:
        """For checkpoints of other tools, which do not record it (codec/row_order.py)."""
        self.add_argument(
            "--row-order",
            choices=ROW_ORDERS,
            help="order of WINT2 rows in a checkpoint that does not record it",
        )

    def json(self, others: Sequence[str] = ()) -> None:
        """--json, and --force for it and for other flags that name a file of results."""
        self.add_argument("--json", metavar="FILE", help="write the result here as JSON too")
        flags = " and ".join(["--json", *others])
        self.add_argument("--force", action="store_true", help=f"let {flags} overwrite a file")

    def quiet(self, what: str = "no progress and no messages; results and errors only") -> None:
        """Nothing but errors goes to standard error; `what` says what is printed nonetheless."""
        self.add_argument("--quiet", action="store_true", help=what)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with the subject in its place whichever way it was given."""
        found = super().parse_args(args, namespace)
        if self._subject is not None:
            flag = vars(found).pop(_FLAG)
            place = getattr(found, self._subject)
            if (flag is None) == (place is None):
                self.error(
                    "name the model once: as the first argument, or with --model"
                    if flag is None
                    else f"the model is named twice: {place} and --model {flag}"
                )
            setattr(found, self._subject, place if flag is None else flag)
        return found

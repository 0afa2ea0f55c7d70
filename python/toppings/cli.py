# SPDX-License-Identifier: Apache-2.0
"""The ``toppings`` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from toppings import __version__, cli_calibrate, cli_pack
from toppings.adapter import describe, read_adapter
from toppings.adapter.image import describe_packed, is_packed
from toppings.errors import ToppingsError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0, or 1 with one line on stderr when it was refused. Also 1, silently, when
    who reads its output doesn't want the rest.
    """
    parser = argparse.ArgumentParser(prog="toppings", description="Multi-LoRA serving.")
    parser.add_argument("--version", action="version", version=f"toppings {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect", help="print an adapter's ranks, scales, projections and bytes"
    )
    inspect.add_argument("path", type=Path, help="a PEFT folder or a packed file")
    inspect.set_defaults(run=_inspect)
    pack = commands.add_parser("pack", help="write an adapter as one file that loads at disk speed")
    cli_pack.add_arguments(pack)
    pack.set_defaults(run=cli_pack.run)
    calibrate = commands.add_parser("calibrate", help="measure this machine, for the planner")
    cli_calibrate.add_arguments(calibrate)
    calibrate.set_defaults(run=cli_calibrate.run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except ToppingsError as error:
        print(f"toppings: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:
        reason = str(error) or "none left"
        print(f"toppings: memory: expected enough for the command, got {reason}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Else the interpreter flushes once more at its exit, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _inspect(args: argparse.Namespace) -> None:
    packed = is_packed(args.path)
    print(describe_packed(args.path) if packed else describe(read_adapter(args.path)))


if __name__ == "__main__":
    sys.exit(main())

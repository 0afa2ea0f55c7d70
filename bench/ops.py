# SPDX-License-Identifier: Apache-2.0
"""torch.ops.toppings.lora_forward_ beside its peers, and beside what the machine can do.

`ops.py --help` and `ops.py --device cuda --help` list what each device takes.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

COMMANDS = {"cpu": "on_cpu", "cuda": "gpu.command"}


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=COMMANDS, default="cpu")
    args, rest = parser.parse_known_args()
    try:
        command = import_module(COMMANDS[args.device])
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name}: not installed for {sys.executable}") from None
    return command.main(rest)


if __name__ == "__main__":
    sys.exit(main())

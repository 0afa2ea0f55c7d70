# SPDX-License-Identifier: Apache-2.0
"""The layer-wise loader beside one contiguous copy, and cold prefills beside warm ones."""

from __future__ import annotations

import sys

from loading import command

if __name__ == "__main__":
    sys.exit(command.main(sys.argv[1:]))

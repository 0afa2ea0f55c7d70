# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from pathlib import Path

CMAKE = Path(sys.executable).with_name("cmake")


def run(*command: str | Path, **kwargs) -> str:
    """Its output; an error shows everything the command said."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout

"""The C++ runner as a process."""

import os
import subprocess


def run(runner, *words, **environment):
    done = subprocess.run(
        [str(runner), *map(str, words)], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode in (0, 1, 2), done.stderr  # never a crash
    return done

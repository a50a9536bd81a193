"""Runs Triton work in a child process: interpreting and compiling need two processes, each told before its import."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def interpret(name: str, *, profile: str = "quick") -> None:
    """Runs tests/cross/interpret_<name>.py with Triton's interpreter and fails with its output where it fails."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",  # numpy's, on the infinities and NaN that the laws feed it
        f"tests/cross/interpret_{name}.py",
    ]
    env = environment(TRITON_INTERPRET="1", HYPOTHESIS_PROFILE=profile)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(
            f"the interpreted kernel {name} breaks its law\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
        )


def python(*arguments: str) -> str:
    """Standard output of a Python child that compiles; fails with its errors where it fails."""
    env = environment(TRITON_INTERPRET="0")
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(arguments)} failed\n{done.stderr[-4000:]}")
    return done.stdout


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}

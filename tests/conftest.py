"""Profiles of hypothesis, quiet logs, a cache folder for each run, and the time budget that the suite keeps."""

import os
import sys
import tempfile
import time
import warnings

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers on two cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
else:  # measurements and packages of this run alone; the workers inherit it
    CACHE = tempfile.TemporaryDirectory(prefix="compiled_attn-tests-", ignore_cleanup_errors=True)
    os.environ["XDG_CACHE_HOME"] = CACHE.name

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, os.path.dirname(__file__))

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("quick", max_examples=25, **COMMON)
settings.register_profile("check", max_examples=100, **COMMON)
settings.register_profile("deep", max_examples=2000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

BUDGET_SECONDS = 35 * 60.0  # README's test command, on two cores
BEGAN = time.monotonic()

warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state and the same number of threads."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


def pytest_sessionfinish(session, exitstatus):
    """A run of the ordinary tests that outlives its budget fails, and says so."""
    spent = time.monotonic() - BEGAN
    ordinary = "not deep" in (session.config.getoption("-m") or "")
    if ordinary and spent > BUDGET_SECONDS and exitstatus == 0:
        print(f"\nthe ordinary tests took {spent:.0f} s; their budget is {BUDGET_SECONDS:.0f} s")
        session.exitstatus = 1

"""Child process two of the emulation: runs generated CUDA code on CPU tensors and writes what comes out.

    TRITON_INTERPRET=1 python tests/cross/emulate_interpret.py first|every FOLDER/CASE...

In each case's folder, from code.py and call.pt: found.pt, the outputs and the kernels launched, or failure.txt.
`every` runs all candidates of an autotuned kernel.
"""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from emulate_device import Device, install


def main() -> None:
    candidates, *places = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, on infinities
    install()
    for place in map(Path, places):
        began = time.process_time()
        device = Device(every=candidates == "every")
        try:
            inputs = [device.upload(*given) for given in torch.load(place / "call.pt")["inputs"]]
            outputs = device.run((place / "code.py").read_text(), inputs)
        except Exception:
            (place / "failure.txt").write_text(traceback.format_exc())
            continue
        found = {"outputs": [o.contiguous() for o in outputs], "kernels": device.kernels}
        torch.save(found | {"seconds": time.process_time() - began}, place / "found.pt")


if __name__ == "__main__":
    main()

"""The front door: ``python train.py --task depth --freeze`` is ``python -m mtl train --task depth --freeze``."""

import sys

from mtl.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], program="train.py"))

"""torchrun train.py --cfg configs/….yaml [key.sub=value …]: pre-train or fine-tune a detector."""

import sys

from aligndet.cli import train

if __name__ == "__main__":
    sys.exit(train())

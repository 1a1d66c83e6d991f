"""python eval.py --cfg configs/….yaml --weights model.pt [key.sub=value …]: COCO metrics of a trained detector."""

import sys

from aligndet.cli import evaluate_weights

if __name__ == "__main__":
    sys.exit(evaluate_weights())

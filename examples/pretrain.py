"""A pretraining script to copy and change: config in, trained model out.

torchrun --nproc-per-node 2 examples/pretrain.py examples/ci.yaml --train-iters 40
"""

import sys
from pathlib import Path

from ep_megatron.train.config import load_config
from ep_megatron.train.launch import run_recorded
from ep_megatron.train.pretrain import pretrain


def main() -> int:
    words = sys.argv[1:]
    resume = "--resume" in words
    config_file, *overrides = [word for word in words if word != "--resume"]
    return pretrain(load_config(Path(config_file), overrides), resume)


# Saving a checkpoint starts another process, which imports this file again.
if __name__ == "__main__":
    sys.exit(run_recorded(main))

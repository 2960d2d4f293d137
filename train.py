"""`python train.py …` and `torchrun train.py …`: the command `cspnet-train`."""

from cspnet.cli import main_train

if __name__ == "__main__":
    main_train()

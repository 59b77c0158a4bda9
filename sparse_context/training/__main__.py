"""`accelerate launch -m sparse_context.training ...` is `sparse-context train ...` in each process."""

import runpy
import sys

if __name__ == "__main__":
    # The command lives above this room, which may not import it, so it is run as a whole
    sys.argv[1:1] = ["train"]
    runpy.run_module("sparse_context", run_name="__main__")

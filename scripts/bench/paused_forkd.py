"""forkd with another pause of its busy workers (docs/performance.md), for the experiment that shows its effect.

    paused_forkd.py PAUSE_MS [forkd's own arguments]

There is no setting for it: nobody who runs forkd should have to think about it. 0 turns moderation off.
It runs on the sources: in a compiled module the pause is part of the code.
"""

import sys

sys.path.pop(0)  # forkd's imports are not to be found in this folder

import workers.loop
from forkd.cli import main

if __name__ == "__main__":
    pause_secs = float(sys.argv[1]) / 1000
    vars(workers.loop)["PAUSE_SECS"] = pause_secs
    if pause_secs == 0:
        vars(workers.loop)["GAP_SECS"] = -1.0  # no wake-up is ever quick, so the loop is never busy
    sys.exit(main(sys.argv[2:]))

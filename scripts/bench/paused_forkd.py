"""forkd with another pause of its busy workers (docs/performance.md), for the experiment that shows its effect.

    paused_forkd.py PAUSE_MS [forkd's own arguments]

There is no setting for it: nobody who runs forkd should have to think about it. 0 turns moderation off.
"""

import sys
from collections.abc import Sequence

sys.path.pop(0)  # forkd's imports are not to be found in this folder

from forkd import compiled


def main(pause_secs: float, arguments: Sequence[str]) -> int:
    """Run forkd so, compiled if it is; returns the exit status."""
    why_not = compiled.prefer()
    import workers.loop  # noqa: PLC0415
    from forkd import cli  # noqa: PLC0415

    vars(workers.loop)["PAUSE_SECS"] = pause_secs
    return cli.main(arguments, why_not)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) / 1000, sys.argv[2:]))

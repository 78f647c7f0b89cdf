"""The same relay as others would write it, to compare forkd with. What they need is in pyproject's extra `rivals`."""

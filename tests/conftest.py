"""What every test shares."""

from hypothesis import HealthCheck, settings

# Examples may take long on a machine that is busy with other things; that is no fault of theirs.
settings.register_profile("forkd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("forkd")

"""``paperscale doctor``: what works here and what does not, each with its fix.

Every check is a function that returns findings. They run beside each other, each with a time limit: a file system
that hangs, or a name server that does not answer, is a finding like any other.
"""

from paperscale.doctor.findings import Asked, checks

__all__ = ["Asked", "checks"]

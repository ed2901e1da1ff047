"""``paperscale bench data``: Paperscale's loaders beside its peers, on the same samples, in interleaved rounds.

Every peer runs in a process of its own, with the interpreter of an environment that holds that peer, and is spoken to
in lines of JSON. The files that run there (``runner``, ``meters``, ``works`` and ``peers``) import nothing of
Paperscale but each other; only the peer that is Paperscale itself does.
"""

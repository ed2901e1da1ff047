"""The peers: each module shows one library to the runner, through a class ``Peer``."""

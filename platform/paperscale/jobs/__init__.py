"""Runs and the jobs that carry them: the run's directory, cluster profiles, submission, life of an attempt."""

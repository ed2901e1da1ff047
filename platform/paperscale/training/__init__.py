"""Running a recipe: checkpoints, interruption, progress, and the step between Lightning and a cluster's job."""

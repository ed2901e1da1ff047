"""``paperscale report``: a paper's figures and tables beside ours, as one HTML page made from the runs' directories."""

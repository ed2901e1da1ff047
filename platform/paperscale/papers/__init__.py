"""One file per paper: its network and its LightningModule, in the paper's own terms."""

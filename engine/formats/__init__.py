"""Foreign checkpoints, one file each: key maps in both directions, strict loading."""

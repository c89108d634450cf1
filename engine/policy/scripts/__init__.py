"""Scripts of table-top tasks from ground-truth poses, one file a kind of motion."""

"""Where answers come from. Each backend is a small file with no loop code in it."""

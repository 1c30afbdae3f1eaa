"""Every option of compare, with its default and what it may be."""

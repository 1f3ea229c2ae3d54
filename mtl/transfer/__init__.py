"""Where weights come from, what of them learns, and how fast."""

"""What Lightning trains, and what happens around it."""

"""Transfer and multi-task learning for dense vision prediction."""

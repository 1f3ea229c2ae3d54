"""Several models as one: of their answers, of their weights, and of one model's random passes."""

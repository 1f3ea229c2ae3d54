"""How each family of backbones is masked, and what is predicted of what it does not see."""

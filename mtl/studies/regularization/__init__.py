"""Which regularization narrows the gap between training and test error, and by how much, measured over seeds."""

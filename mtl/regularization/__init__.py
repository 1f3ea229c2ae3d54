"""What narrows the gap between training and test by changing the loss, the gradient or the weights of a step."""

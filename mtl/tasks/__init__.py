"""What is predicted, one file a task."""

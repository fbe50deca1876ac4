"""Training: the task, the objective, one step, the data and the loop around them."""

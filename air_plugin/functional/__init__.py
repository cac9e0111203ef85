"""Pure functions of tensors: every formula of the method. They import nothing of ours but each other."""

"""Several processes, the ranks, that save and resume one run together. They meet in the run's store and nowhere else:
no collective is called, and nothing behind the training loop touches a process group."""

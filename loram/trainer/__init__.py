"""What every training shares: arguments of the libraries' trainers, and checkpoints that resume exactly."""

"""How a model runs: devices, loading, 4 bits, streaming from disk, losses and likelihoods."""

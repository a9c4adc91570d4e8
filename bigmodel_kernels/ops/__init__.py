"""One folder per operation; each holds its public function, its definition in plain PyTorch and its
backends."""

"""Files of `torch.save`, read without running the code that they name."""

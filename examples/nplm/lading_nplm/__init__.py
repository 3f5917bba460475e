"""The neural probabilistic language model, as a family of lading."""

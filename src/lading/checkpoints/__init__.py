"""From a card to files that are here and trusted."""

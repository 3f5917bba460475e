"""Planning: the bytes of files that go to each place in memory. Pure functions, without torch."""

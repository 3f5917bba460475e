"""From a manifest to memory: what is wanted, the plan, the bytes."""

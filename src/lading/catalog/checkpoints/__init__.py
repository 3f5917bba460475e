"""The rows of checkpoints: manifests, digests, local copies and the audit."""

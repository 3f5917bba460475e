"""Object stores: ``s3://``, ``gs://`` and ``az://``, by the package obstore."""

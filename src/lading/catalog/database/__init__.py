"""The database under the catalog: where it is, how it is opened, migrated and checked."""

"""The database under the catalog: its place, connections, migrations and checks."""

"""Sources of rows: files, folders, tables, the hub, mixtures."""

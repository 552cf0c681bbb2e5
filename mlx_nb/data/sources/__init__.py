"""Where rows come from: files, folders, tables, the hub, mixtures."""
